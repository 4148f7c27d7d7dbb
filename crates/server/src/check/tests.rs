use std::path::{Path, PathBuf};

use clap::Parser;
use serde_json::{Map, Value, json};

use super::*;
use crate::cli::{Cli, Command};
use crate::demo;

fn report_on(model: &str, flags: &[&str]) -> Report {
    let arguments = ["lapidary", "check", model].into_iter().chain(flags.iter().copied());
    let Command::Check(args) = Cli::try_parse_from(arguments).unwrap().command else {
        panic!("the command is check");
    };
    check(&args, &Environment::default()).unwrap()
}

/// The demo checkpoint as a directory, to be broken. Removed when dropped.
struct Copy(PathBuf);

impl Copy {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("lapidary-check-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for (file, bytes) in demo::FILES {
            std::fs::write(folder.join(file), bytes).unwrap();
        }
        Self(folder)
    }

    fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let path = self.0.join(file);
        let mut object = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut object);
        std::fs::write(path, serde_json::to_vec(&object).unwrap()).unwrap();
    }

    /// Header and data of the weights.
    fn edit_weights(&self, edit: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
        let path = self.0.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let mut data = bytes[8 + length..].to_vec();
        edit(&mut header, &mut data);
        let header = serde_json::to_vec(&header).unwrap();
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(path, [&length[..], &header, &data].concat()).unwrap();
    }

    /// Adds tensors of one F32 each.
    fn add_scalars(&self, scalars: &[(&str, f32)]) {
        self.edit_weights(|header, data| {
            for (name, scalar) in scalars {
                let start = data.len();
                data.extend(scalar.to_le_bytes());
                let tensor = json!({"dtype": "F32", "shape": [], "data_offsets": [start, data.len()]});
                header.insert((*name).to_owned(), tensor);
            }
        });
    }

    /// Overwrites the beginning of a tensor.
    fn poke(&self, tensor: &str, bytes: &[u8]) {
        self.edit_weights(|header, data| {
            let start = usize::try_from(header[tensor]["data_offsets"][0].as_u64().unwrap()).unwrap();
            data[start..start + bytes.len()].copy_from_slice(bytes);
        });
    }

    fn report(&self, flags: &[&str]) -> Report {
        report_on(self.0.to_str().unwrap(), flags)
    }

    /// The only fault.
    fn fault(&self) -> String {
        let report = self.report(&[]);
        assert!(!report.is_sound);
        assert_eq!(report.faults.len(), 1, "{:?}", report.faults);
        format!("{}: {}", report.faults[0].part, report.faults[0].message)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_demo_model_is_sound_and_described() {
    let report = report_on("demo", &["--memory", "1GiB", "--max-model-len", "1000"]);
    assert!(report.is_sound && report.warnings.is_empty(), "{report}");
    let architecture = report.architecture.as_ref().unwrap();
    assert_eq!((architecture.layers, architecture.vocab_size), (4, 3072));
    assert_eq!(report.scales.len(), 4 * 4, "four stacks in each layer");
    assert!(
        report
            .scales
            .iter()
            .all(|scales| scales.input == "static" && scales.weight_min > 0.0)
    );
    let stops: Vec<_> = report
        .stop_tokens
        .iter()
        .map(|token| (token.id, token.text.as_deref()))
        .collect();
    assert_eq!(stops, [(1, Some("<eos>")), (107, Some("<end_of_turn>"))]);
    let memory = report.memory.as_ref().unwrap();
    // Keys and values, 4 layers, 2 heads of 128, 2 bytes.
    assert_eq!(memory.kv_bytes_per_token, 2 * 4 * 2 * 128 * 2);
    let device = memory.device.as_ref().unwrap();
    let usable = (0.9 * f64::from(1 << 30)) as u64 - memory.weight_bytes - memory.scratch_bytes;
    assert_eq!(device.kv_cache_tokens, usable / (16 * memory.kv_bytes_per_token) * 16);
    assert_eq!(device.full_sequences, device.kv_cache_tokens / 1000);
    let text = report.to_string();
    assert!(text.starts_with("demo: sound\n"), "{text}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(
        (&json["is_sound"], &json["tensors"]["count"]),
        (&json!(true), &json!(46))
    );
}

#[test]
fn every_golden_checkpoint_lacks_a_tokenizer_and_nothing_else() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden");
    let folders = std::fs::read_dir(fixtures)
        .unwrap()
        .map(|folder| folder.unwrap().path());
    let folders: Vec<_> = folders.filter(|folder| folder.join("config.json").is_file()).collect();
    assert!(folders.len() >= 15);
    for folder in folders {
        let report = report_on(folder.to_str().unwrap(), &["--memory", "1GiB"]);
        let faults: Vec<_> = report.faults.iter().map(|fault| fault.message.as_str()).collect();
        assert_eq!(faults, ["the checkpoint has no tokenizer.json"], "{report}");
        let architecture = report.architecture.as_ref().unwrap();
        assert!(report.tensors.is_some() && report.memory.is_some());
        let num_scales = if architecture.is_quantized {
            4 * architecture.layers
        } else {
            0
        };
        // Projections that the checkpoint leaves in bf16 have none.
        assert!(
            (num_scales.saturating_sub(1)..=num_scales).contains(&report.scales.len()),
            "{report}"
        );
    }
}

#[test]
fn faulty_tensors_are_named() {
    let copy = Copy::new("renamed");
    copy.edit_weights(|header, _| {
        let tensor = header.remove("model.norm.weight").unwrap();
        header.insert("model.norm.wait".to_owned(), tensor);
        header["model.layers.2.mlp.down_proj.weight"]["shape"] = json!([768, 256]);
    });
    let report = copy.report(&[]);
    let faults: Vec<_> = report.faults.iter().map(|fault| fault.message.as_str()).collect();
    for expected in [
        "model.norm.weight is missing",
        "model.norm.wait is not a tensor of this model",
        "model.layers.2.mlp.down_proj.weight has shape [768, 256], expected [256, 768]",
    ] {
        assert!(faults.contains(&expected), "{faults:?}");
    }
    assert_eq!(faults.len(), 3);
    assert!(report.to_string().contains("cannot be served"));
}

#[test]
fn values_that_no_quantiser_writes_are_faults_and_odd_ones_are_pointed_out() {
    let copy = Copy::new("values");
    copy.poke("model.layers.1.mlp.up_proj.weight_scale", &0.0_f32.to_le_bytes());
    let fault = copy.fault();
    assert_eq!(
        fault,
        "weights: model.layers.1.mlp.up_proj.weight_scale: scale 0 at 0 is not positive and finite"
    );
    copy.poke("model.layers.1.mlp.up_proj.weight_scale", &7.5_f32.to_le_bytes());
    copy.poke("model.layers.0.mlp.down_proj.input_scale", &5e4_f32.to_le_bytes());
    let report = copy.report(&[]);
    assert!(report.is_sound);
    let expected = [
        "layer 0, down_proj: an input scale of 50000 makes small inputs vanish",
        "layer 1, gate_proj, up_proj: a weight scale of 7.5 stands for weights up to 3360",
    ];
    assert_eq!(report.warnings, expected);
    copy.poke("model.layers.3.self_attn.o_proj.weight", &[0x7f, 0xff]);
    assert_eq!(
        copy.fault(),
        "weights: model.layers.3.self_attn.o_proj.weight has 2 values that are not finite numbers"
    );
}

#[test]
fn a_mistaken_query_scale_is_pointed_out_beside_the_faults() {
    let copy = Copy::new("scalar");
    copy.edit_json("config.json", |config| {
        for (key, value) in [
            ("hidden_size", json!(3584)),
            ("num_hidden_layers", json!(42)),
            ("query_pre_attn_scalar", json!(224)),
        ] {
            config.insert(key.to_owned(), value);
        }
    });
    let report = copy.report(&[]);
    assert!(
        report.warnings.iter().any(|warning| warning.contains("224")),
        "{:?}",
        report.warnings
    );
    assert_eq!(report.architecture.as_ref().unwrap().query_pre_attn_scalar, 256.0);
    assert_eq!(
        report.faults.last().unwrap().message.split(' ').next(),
        Some("and"),
        "more than can be listed"
    );
    let forced = copy.report(&["--query-pre-attn-scalar", "224"]);
    assert_eq!(forced.architecture.as_ref().unwrap().query_pre_attn_scalar, 224.0);
    assert!(forced.warnings.is_empty(), "{:?}", forced.warnings);
}

#[test]
fn tokenizers_and_templates_are_held_against_the_model() {
    let copy = Copy::new("tokenizer");
    copy.edit_json("generation_config.json", |config| {
        config.insert("eos_token_id".to_owned(), json!([1, 4000]));
    });
    let beyond = "tokenizer: stop token 4000 of generation_config.json is beyond the 3072 rows of the embedding table";
    assert_eq!(copy.fault(), beyond);
    copy.edit_json("generation_config.json", |config| {
        config.remove("eos_token_id");
    });
    copy.edit_json("config.json", |config| {
        config.insert("eos_token_id".to_owned(), json!(1));
    });
    let report = copy.report(&[]);
    assert!(report.is_sound, "{report}");
    let last = report.stop_tokens.last().unwrap();
    assert_eq!((last.id, last.named_by.as_slice()), (107, ["<end_of_turn>"].as_slice()));

    std::fs::write(copy.0.join("chat_template.jinja"), "{% for %}").unwrap();
    let fault = copy.fault();
    assert!(
        fault.starts_with("chat template: cannot use the checkpoint's chat template"),
        "{fault}"
    );
    std::fs::remove_file(copy.0.join("chat_template.jinja")).unwrap();
    std::fs::write(copy.0.join("tokenizer.json"), "{}").unwrap();
    assert!(
        copy.fault()
            .starts_with("tokenizer: cannot use the checkpoint's tokenizer")
    );
}

#[test]
fn what_cannot_be_opened_or_does_not_fit_is_a_fault() {
    let copy = Copy::new("opened");
    let small = [
        "--memory",
        "13MiB",
        "--max-num-seqs",
        "64",
        "--max-num-batched-tokens",
        "512",
    ];
    let report = copy.report(&small);
    assert_eq!(report.faults.len(), 1);
    let message = &report.faults[0].message;
    assert!(message.starts_with("not one sequence of 4096 tokens fits"), "{message}");
    assert!(copy.report(&[&small[..], &["--max-model-len", "16"]].concat()).is_sound);
    let report = copy.report(&["--max-model-len", "5000"]);
    assert_eq!(
        report.faults[0].message,
        "max-model-len is 5000, the model was made for 4096 positions"
    );
    copy.edit_json("config.json", |config| {
        config.insert("num_key_value_heads".to_owned(), json!(3));
    });
    assert!(
        copy.fault()
            .starts_with("checkpoint: cannot open the checkpoint: config.json")
    );
    std::fs::remove_file(copy.0.join("config.json")).unwrap();
    assert!(copy.fault().contains("no config.json"));
}

#[test]
fn an_fp8_kv_cache_is_planned_with_its_scales() {
    let flags = &["--memory", "1GiB", "--max-model-len", "1000"];
    let native = report_on("demo", flags);
    assert!(
        native.kv_scales.is_empty() && native.to_string().contains("a token (in bf16)"),
        "{native}"
    );
    let copy = Copy::new("kv-scales");
    copy.add_scalars(&[
        ("model.layers.0.self_attn.k_scale", 0.5),
        ("model.layers.0.self_attn.v_scale", 0.25),
        ("model.layers.2.self_attn.kv_scale", 0.125),
    ]);
    for name in ["fp8", "fp8_e4m3"] {
        let report = copy.report(&[&flags[..], &["--kv-cache-dtype", name]].concat());
        assert!(report.is_sound, "{report}");
        let [memory, wider] = [&report, &native].map(|report| report.memory.as_ref().unwrap());
        assert_eq!((memory.kv_cache_dtype, wider.kv_cache_dtype), ("fp8_e4m3", "bf16"));
        assert_eq!(2 * memory.kv_bytes_per_token, wider.kv_bytes_per_token);
        let [tokens, fewer] = [memory, wider].map(|memory| memory.device.as_ref().unwrap().kv_cache_tokens);
        // Whole blocks of 16.
        assert!(tokens / 2 - fewer < 16, "{tokens} tokens instead of {fewer}");
        let scales: Vec<_> = report
            .kv_scales
            .iter()
            .map(|scales| (scales.key, scales.value))
            .collect();
        assert_eq!(scales, [(0.5, 0.25), (1.0, 1.0), (0.125, 0.125), (1.0, 1.0)]);
        assert!(
            report
                .warnings
                .iter()
                .any(|warning| warning.starts_with("2 of 4 layers have no scale")),
            "{report}"
        );
        let text = report.to_string();
        assert!(
            text.contains("(in fp8_e4m3)") && text.contains("layer  2  keys 1.250e-1"),
            "{text}"
        );
    }
    let ignored = copy.report(&[]);
    assert!(ignored.is_sound, "{ignored}");
    let hint = "3 scales of an FP8 KV cache are ignored (the first is model.layers.0.self_attn.k_scale): \
                --kv-cache-dtype fp8 uses them";
    assert!(ignored.warnings.iter().any(|warning| warning == hint), "{ignored}");
    copy.add_scalars(&[("model.layers.3.self_attn.v_scale", -1.0)]);
    let broken = copy.report(&["--kv-cache-dtype", "fp8"]);
    let fault = "model.layers.3.self_attn.v_scale: scale -1 at 0 is not positive and finite";
    assert!(
        !broken.is_sound && broken.faults.iter().any(|found| found.message.contains(fault)),
        "{broken}"
    );
}
