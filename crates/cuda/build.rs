//! Compiles `kernels/*.cu`: with nvcc to one cubin for each file and architecture, and, for the feature `emulator`, with
//! g++ to a library that runs them on the CPU.
//!
//! | variable | meaning |
//! |---|---|
//! | `KERNEL_BUILD` | `auto` (default: without nvcc, warn and build without kernels), `require`, `off` |
//! | `KERNEL_ARCHS` | what to build for; default `89,90a,120` and PTX of 89 for what comes later |
//! | `KERNEL_FLAGS` | more flags for nvcc: with `-lineinfo` the sanitizer and the profiler name lines |
//! | `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, `VIRTUAL_ENV`, `/usr/local/cuda` | where nvcc is looked for, in this order |
//! | `EMULATOR_SANITIZE` | `1`: AddressSanitizer and UndefinedBehaviorSanitizer in the emulated kernels |

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, io};

const KERNELS: &str = "../../kernels";
const EMULATOR: &str = "emulator";
const DEFAULT_ARCHS: &str = "89,90a,120";
/// PTX that parts newer than all of the above compile at start.
const PTX_ARCH: &str = "89";
const MIN_NVCC: (u32, u32) = (13, 0);
/// What ptxas says, as plain information, of code that is correct and slow: it must not ship.
const SLOW: [&str; 3] = ["Potential Performance Loss", "setmaxnreg", "will be serialized"];

/// One run of nvcc.
struct Job {
    source: PathBuf,
    arch: String,
    is_ptx: bool,
}

fn main() {
    for variable in [
        "KERNEL_BUILD",
        "KERNEL_ARCHS",
        "KERNEL_FLAGS",
        "NVCC",
        "CUDA_HOME",
        "CUDA_PATH",
        "VIRTUAL_ENV",
        "EMULATOR_SANITIZE",
    ] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    for path in ["build.rs", KERNELS, EMULATOR] {
        println!("cargo::rerun-if-changed={path}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let result = build_images(&out).and_then(|()| {
        let emulated = env::var_os("CARGO_FEATURE_EMULATOR").is_some();
        if emulated { build_emulator(&out) } else { Ok(()) }
    });
    if let Err(message) = result {
        message.lines().for_each(|line| println!("cargo::error={line}"));
    }
}

fn build_images(out: &Path) -> Result<(), String> {
    let mode = env::var("KERNEL_BUILD").unwrap_or_else(|_| "auto".to_owned());
    let nvcc = match (mode.as_str(), find_nvcc()) {
        ("off", _) => return write_table(out, &[]),
        (_, Ok(nvcc)) => nvcc,
        ("auto", Err(why)) => {
            println!(
                "cargo::warning={why} Building without CUDA kernels: the program will run on the CPU only. \
                 `pip install \"cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.2\"` brings nvcc; KERNEL_BUILD=off silences this."
            );
            return write_table(out, &[]);
        }
        (_, Err(why)) => return Err(why),
    };
    let jobs = jobs()?;
    // OUT_DIR is <target>/<profile>/build/<package>/out: the cache serves all profiles.
    let cache = out.ancestors().nth(4).unwrap_or(out).join("kernel-cache");
    fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    let images = in_parallel(&jobs, |job| compile(&nvcc, job, &cache))?;
    let rows: Vec<_> = jobs.iter().zip(images).collect();
    write_table(out, &rows)
}

/// Files named `x.sm90a.cu` are for that architecture only.
fn jobs() -> Result<Vec<Job>, String> {
    let archs = env::var("KERNEL_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.to_owned());
    let mut jobs = Vec::new();
    for source in sources()? {
        let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let only = name
            .strip_suffix(".cu")
            .and_then(|stem| stem.split_once(".sm"))
            .map(|(_, arch)| arch);
        let fits = |arch: &&str| only.is_none_or(|only| only == *arch);
        for arch in archs.split(',').map(str::trim).filter(fits) {
            jobs.push(Job {
                source: source.clone(),
                arch: arch.to_owned(),
                is_ptx: false,
            });
        }
        if only.is_none() {
            jobs.push(Job {
                source: source.clone(),
                arch: PTX_ARCH.to_owned(),
                is_ptx: true,
            });
        }
    }
    Ok(jobs)
}

fn sources() -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(KERNELS).map_err(|error| format!("{KERNELS}: {error}"))?;
    let mut sources: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    Ok(sources)
}

fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> Result<R, String> + Sync) -> Result<Vec<R>, String> {
    let threads = env::var("NUM_JOBS")
        .ok()
        .and_then(|jobs| jobs.parse().ok())
        .unwrap_or(1_usize);
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<Result<R, String>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let index = items
                        .iter()
                        .position(|other| std::ptr::eq(other, item))
                        .expect("it is one of them");
                    *results[index].lock().expect("no one panics") = Some(work(item));
                }
            });
        }
    });
    results
        .into_iter()
        .map(|result| {
            result
                .into_inner()
                .expect("no one panics")
                .expect("every item was worked on")
        })
        .collect()
}

fn find_nvcc() -> Result<PathBuf, String> {
    let mut candidates: Vec<PathBuf> = env::var_os("NVCC").map(PathBuf::from).into_iter().collect();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        candidates.extend(env::var_os(variable).map(|home| PathBuf::from(home).join("bin/nvcc")));
    }
    candidates.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()).map(|path| path.join("nvcc")));
    // `pip install` puts it among the packages, not on PATH.
    let libraries = env::var_os("VIRTUAL_ENV").and_then(|venv| fs::read_dir(PathBuf::from(venv).join("lib")).ok());
    for python in libraries.into_iter().flatten().flatten() {
        candidates.push(python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    }
    candidates.push(PathBuf::from("/usr/local/cuda/bin/nvcc"));
    let nvcc = candidates.into_iter().find(|path| path.is_file()).ok_or(
        "nvcc was not found in $NVCC, $CUDA_HOME/bin, $CUDA_PATH/bin, $PATH, $VIRTUAL_ENV or /usr/local/cuda/bin.",
    )?;
    let banner = output(Command::new(&nvcc).arg("--version"))?;
    let version = banner.split("release ").nth(1).and_then(|rest| {
        let (major, minor) = rest.split(',').next()?.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    match version {
        Some(version) if version >= MIN_NVCC => Ok(nvcc),
        _ => Err(format!(
            "{} is not CUDA {}.{} or newer.",
            nvcc.display(),
            MIN_NVCC.0,
            MIN_NVCC.1
        )),
    }
}

fn output(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{program} failed:\n{text}"))
    }
}

/// The compiled image, from the cache if nothing that goes into it has changed. What ptxas said lies beside it.
fn compile(nvcc: &Path, job: &Job, cache: &Path) -> Result<PathBuf, String> {
    let Job { source, arch, is_ptx } = job;
    let (code, extension) = if *is_ptx { ("compute", "ptx") } else { ("sm", "cubin") };
    let mut flags = vec![
        "-std=c++17".to_owned(),
        "-O3".to_owned(),
        "-DNDEBUG".to_owned(),
        "-Xptxas=-v,-warn-spills".to_owned(),
        format!("-I{KERNELS}"),
        format!("-gencode=arch=compute_{arch},code={code}_{arch}"),
        format!("-{extension}"),
    ];
    let more = env::var("KERNEL_FLAGS").unwrap_or_default();
    flags.extend(more.split_whitespace().map(str::to_owned));
    let mut hash = Fnv::new();
    flags.iter().for_each(|flag| hash.add(flag.as_bytes()));
    hash.add(output(Command::new(nvcc).arg("--version"))?.as_bytes());
    let mut files = BTreeSet::new();
    collect_includes(source, &mut files).map_err(|error| format!("{}: {error}", source.display()))?;
    for file in files {
        hash.add(&fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?);
    }
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    let image = cache.join(format!("{stem}-{code}_{arch}-{:016x}.{extension}", hash.0));
    if image.is_file() {
        return Ok(image);
    }
    let unfinished = image.with_extension(format!("{extension}-{}", std::process::id()));
    let log = output(Command::new(nvcc).args(&flags).arg("-o").arg(&unfinished).arg(source))?;
    refuse_slow_code(&log).map_err(|line| format!("{} for {code}_{arch}: {line}", source.display()))?;
    let write = || -> io::Result<()> {
        fs::write(image.with_extension("log"), &log)?;
        fs::rename(&unfinished, &image)
    };
    write().map_err(|error| format!("{}: {error}", image.display()))?;
    Ok(image)
}

fn refuse_slow_code(log: &str) -> Result<(), &str> {
    let spills = |line: &str| {
        line.split_once(" bytes spill stores")
            .is_some_and(|(before, _)| before.rsplit([' ', ',']).next() != Some("0"))
    };
    let slow = log
        .lines()
        .find(|line| SLOW.iter().any(|word| line.contains(word)) || spills(line));
    slow.map_or(Ok(()), Err)
}

/// The source and every header it names in quotes, by name relative to the folder of the kernels or of the file.
fn collect_includes(source: &Path, files: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    if !files.insert(source.to_owned()) {
        return Ok(());
    }
    for line in fs::read_to_string(source)?.lines() {
        let Some(name) = line
            .trim()
            .strip_prefix("#include \"")
            .and_then(|rest| rest.split('"').next())
        else {
            continue;
        };
        let beside = source.parent().map(|folder| folder.join(name));
        let found = beside
            .into_iter()
            .chain([Path::new(KERNELS).join(name)])
            .find(|path| path.is_file());
        found.map_or(Ok(()), |path| collect_includes(&path, files))?;
    }
    Ok(())
}

fn write_table(out: &Path, rows: &[(&Job, PathBuf)]) -> Result<(), String> {
    let mut table = String::from("&[\n");
    for (job, image) in rows {
        let Job { source, arch, is_ptx } = job;
        let file = source.file_name().unwrap_or_default().to_string_lossy();
        table += &format!(
            "    Image {{ file: {file:?}, arch: {arch:?}, is_ptx: {is_ptx}, bytes: &Aligned(*include_bytes!({image:?})).0 }},\n"
        );
    }
    table += "]\n";
    fs::write(out.join("images.rs"), table).map_err(|error| format!("{}: {error}", out.display()))
}

fn build_emulator(out: &Path) -> Result<(), String> {
    let compiler = env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let sanitize = env::var("EMULATOR_SANITIZE").is_ok_and(|value| value == "1");
    let mut sources = sources()?;
    sources.push(Path::new(EMULATOR).join("emulator.cpp"));
    let objects = in_parallel(&sources, |source| {
        let object = out.join(source.file_name().unwrap_or_default()).with_extension("o");
        let mut command = Command::new(&compiler);
        // Optimised in every profile: an emulated kernel is slow enough.
        command.args([
            "-std=c++17",
            "-O2",
            "-g1",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
        ]);
        command.args([
            "-DLAPIDARY_EMULATOR",
            "-ffp-contract=off",
            "-I",
            KERNELS,
            "-I",
            EMULATOR,
        ]);
        if sanitize {
            command.args([
                "-fsanitize=address,undefined",
                // A kernel's threads are fibers, on stacks that the sanitizer would take for one another's.
                "--param=asan-stack=0",
                "-fno-sanitize-recover=undefined",
                "-fno-sanitize=alignment",
            ]);
        }
        output(command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(&object)).map(|_| object)
    })?;
    let library = out.join("liblapidary_emulator.a");
    match fs::remove_file(&library) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(format!("{}: {error}", library.display())),
        _ => {}
    }
    output(Command::new("ar").arg("crs").arg(&library).args(&objects))?;
    println!("cargo::rustc-link-search=native={}", out.display());
    // Kernels register themselves: nothing refers to them.
    println!("cargo::rustc-link-lib=static:+whole-archive=lapidary_emulator");
    println!("cargo::rustc-link-lib=stdc++");
    if sanitize {
        println!("cargo::rustc-link-lib=asan");
        println!("cargo::rustc-link-lib=ubsan");
    }
    Ok(())
}

/// FNV-1a.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes.iter().chain(&(bytes.len() as u64).to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
