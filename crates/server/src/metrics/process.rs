//! What the operating system says about this process, under the names Prometheus clients share. Linux only; elsewhere
//! there is nothing to report.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use super::exposition::{Exposition, Labels};

/// `USER_HZ`: the kernel's unit for times in `/proc`, 100 on every architecture Linux serves this on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Seconds since 1970 at which the process started, as near as this call is to it.
pub(crate) fn now_seconds() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

/// Writes all there is.
pub(crate) fn write(out: &mut Exposition, started_seconds: f64) {
    let none = &Labels::default();
    out.gauge(
        "process_start_time_seconds",
        "Start time of the process since unix epoch in seconds.",
        none,
        started_seconds,
    );
    if let Some([resident, virtual_size]) = memory_bytes() {
        out.gauge(
            "process_resident_memory_bytes",
            "Resident memory size in bytes.",
            none,
            resident,
        );
        out.gauge(
            "process_virtual_memory_bytes",
            "Virtual memory size in bytes.",
            none,
            virtual_size,
        );
    }
    if let Some((cpu_seconds, threads)) = cpu_and_threads() {
        out.counter(
            "process_cpu_seconds_total",
            "Total user and system CPU time spent in seconds.",
            none,
            cpu_seconds,
        );
        out.gauge("process_threads", "Number of OS threads in the process.", none, threads);
    }
    if let Some(open) = open_files() {
        out.gauge("process_open_fds", "Number of open file descriptors.", none, open);
    }
    if let Some(max) = max_files() {
        out.gauge("process_max_fds", "Maximum number of open file descriptors.", none, max);
    }
}

/// Resident and virtual.
fn memory_bytes() -> Option<[f64; 2]> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| -> Option<f64> {
        let line = status.lines().find(|line| line.starts_with(name))?;
        Some(line.split_ascii_whitespace().nth(1)?.parse::<f64>().ok()? * 1024.0)
    };
    Some([field("VmRSS:")?, field("VmSize:")?])
}

fn cpu_and_threads() -> Option<(f64, f64)> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the program's name in parentheses and may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<f64>().ok();
    Some(((number(11)? + number(12)?) / TICKS_PER_SECOND, number(17)?))
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus values are f64")]
fn open_files() -> Option<f64> {
    let folder = "/proc/self/fd";
    // Linux 6.2 and later say it as the folder's size: listing thousands of connections takes longer than all else here.
    let count = match fs::metadata(folder).ok()?.len() {
        0 => fs::read_dir(folder).ok()?.count() as u64,
        count => count,
    };
    Some(count as f64)
}

fn max_files() -> Option<f64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find(|line| line.starts_with("Max open files"))?;
    line.split_ascii_whitespace().nth(3)?.parse().ok()
}
