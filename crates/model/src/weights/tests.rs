use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{INDEX_FILE, Weights};

/// A safetensors file of any header, true or not.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn tensor(dtype: &str, shape: &[u64], offsets: [u64; 2]) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": offsets})
}

fn refusal(bytes: Vec<u8>) -> String {
    let error = Weights::from_bytes(bytes).expect_err("the file is broken");
    let source = std::error::Error::source(&error).map_or_else(String::new, |source| format!(": {source}"));
    format!("{error}{source}")
}

/// A directory of its own for a test, removed when it ends.
struct TestDir(PathBuf);

impl TestDir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("lapidary-weights-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("the temporary directory is writable");
        Self(path)
    }

    fn with(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        fs::write(self.0.join(name), content).expect("the temporary directory is writable");
        self
    }

    fn refusal(&self) -> String {
        Weights::open_dir(&self.0)
            .expect_err("the directory is broken")
            .to_string()
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn shard(name: &str) -> Vec<u8> {
    file(&json!({ name: tensor("F32", &[1], [0, 4]) }).to_string(), &[0; 4])
}

fn index(map: Value) -> String {
    let map = Map::from_iter([("weight_map".to_owned(), map)]);
    Value::Object(map).to_string()
}

#[test]
fn tensors_are_found_by_name_whatever_their_order() {
    let header = json!({
        "__metadata__": {"format": "pt"},
        "b": tensor("BF16", &[2, 3], [4, 16]),
        "a": tensor("F32", &[], [0, 4]),
        "empty": tensor("F16", &[0, 5], [16, 16]),
    });
    let weights = Weights::from_bytes(file(&header.to_string(), &(0..16).collect::<Vec<u8>>())).unwrap();
    assert_eq!((weights.len(), weights.total_bytes()), (3, 16));
    let b = weights.get("b").unwrap();
    assert_eq!(
        (b.dtype, b.shape, b.data),
        ("BF16", [2, 3].as_slice(), (4..16).collect::<Vec<u8>>().as_slice())
    );
    assert!(weights.get("c").is_none());
}

#[test]
fn every_truncation_of_a_file_is_refused() {
    let whole = shard("a");
    for length in 0..whole.len() {
        assert!(Weights::from_bytes(whole[..length].to_vec()).is_err(), "{length} bytes");
    }
    assert!(refusal([whole, vec![0]].concat()).contains("5 bytes of tensors where the header describes 4"));
}

#[test]
fn headers_that_lie_are_refused_by_tensor() {
    let cases = [
        (json!({"a": tensor("F32", &[2], [0, 4])}).to_string(), "a: bytes 0..4"),
        (
            json!({"a": tensor("F32", &[1], [4, 0])}).to_string(),
            "the header describes 0",
        ),
        (
            json!({"a": tensor("F32", &[1 << 40, 1 << 40], [0, 4])}).to_string(),
            "a: bytes 0..4",
        ),
        (
            json!({"a": tensor("F32", &[u64::MAX], [0, 4])}).to_string(),
            "a: bytes 0..4",
        ),
        (
            json!({"a": tensor("F32", &[1], [0, u64::MAX])}).to_string(),
            "incomplete",
        ),
        (
            json!({"a": tensor("U8", &[3], [0, 3]), "b": tensor("U8", &[2], [2, 4])}).to_string(),
            "b begins at byte 2",
        ),
        (
            json!({"a": tensor("U8", &[1], [0, 1]), "b": tensor("U8", &[2], [2, 4])}).to_string(),
            "b begins at byte 2",
        ),
        (
            json!({"a": tensor("U8", &[3], [1, 4])}).to_string(),
            "a begins at byte 1",
        ),
        (json!({"a": {"dtype": "F32", "shape": [1]}}).to_string(), "data_offsets"),
        (
            json!({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}).to_string(),
            "-1",
        ),
        (json!({"a": 1}).to_string(), "corrupt"),
        (json!([1]).to_string(), "a map from tensor names"),
        ("{\"a\"".to_owned(), "corrupt"),
        (String::new(), "corrupt"),
    ];
    for (header, named) in cases {
        let error = refusal(file(&header, &[0; 4]));
        assert!(error.contains(named), "{header}: {error}");
    }
}

#[test]
fn one_name_for_two_tensors_is_refused() {
    let entry = tensor("U8", &[2], [0, 2]);
    let header = format!("{{\"a\": {entry}, \"a\": {}}}", tensor("U8", &[2], [2, 4]));
    assert!(refusal(file(&header, &[0; 4])).contains("a is both in"));
}

#[test]
fn a_doubled_name_is_refused_where_the_second_tensor_alone_is_a_whole_file() {
    let entry = tensor("U8", &[4], [0, 4]);
    let header = format!("{{\"a\": {entry}, \"a\": {entry}}}");
    assert!(refusal(file(&header, &[0; 4])).contains("a is both in"));
}

#[test]
fn sizes_that_overflow_only_together_are_refused() {
    let bytes = (1_u64 << 61) - 1;
    let entries = (0..8).map(|at| (format!("t{at}"), tensor("U8", &[bytes], [at * bytes, (at + 1) * bytes])));
    let header = Value::Object(entries.collect()).to_string();
    assert!(refusal(file(&header, &[0; 4])).contains("incomplete download?"));
}

#[test]
fn entries_that_cannot_be_read_are_refused_by_tensor() {
    let cases = [
        (json!({"a.b": tensor("Q4", &[4], [0, 4])}), "a.b: unknown variant `Q4`"),
        (json!({"a.b": {"dtype": "U8", "shape": [4]}}), "a.b: missing field"),
        (json!({"a.b": tensor("F4", &[7], [0, 4])}), "a.b: bytes 0..4"),
        (
            json!({"a": tensor("U8", &[4], [0, 4]), "__metadata__": {"format": 1}}),
            "expected a string",
        ),
    ];
    for (header, named) in cases {
        let error = refusal(file(&header.to_string(), &[0; 4]));
        assert!(error.contains(named), "{header}: {error}");
    }
}

#[test]
fn a_header_longer_than_the_format_allows_is_refused_unread() {
    let mut bytes = u64::MAX.to_le_bytes().to_vec();
    bytes.extend([0; 64]);
    assert!(refusal(bytes).contains("a header of 18446744073709551615 bytes"));
}

#[test]
fn shards_are_joined_by_their_index() {
    let dir = TestDir::new("joined")
        .with("x-1.safetensors", shard("a"))
        .with("x-2.safetensors", shard("b"))
        .with(
            INDEX_FILE,
            index(json!({"a": "x-1.safetensors", "b": "x-2.safetensors"})),
        );
    let weights = Weights::open_dir(&dir.0).unwrap();
    assert_eq!(weights.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn an_index_that_does_not_match_its_shards_is_refused() {
    let dir = || {
        TestDir::new("index")
            .with("x.safetensors", shard("a"))
            .with("y.safetensors", shard("a"))
    };
    let cases = [
        (index(json!({"a": "z.safetensors"})), "z.safetensors, which"),
        (index(json!({"b": "x.safetensors"})), "b is not in x.safetensors"),
        (
            index(json!({"a": "x.safetensors", "b": "y.safetensors"})),
            "a is both in x.safetensors and in y.safetensors",
        ),
        ("{".to_owned(), "corrupt"),
        (json!({"weight_map": ["x.safetensors"]}).to_string(), "corrupt"),
        (json!({}).to_string(), "corrupt"),
    ];
    for (index, named) in cases {
        let error = dir().with(INDEX_FILE, &index).refusal();
        assert!(error.contains(named), "{index}: {error}");
    }
}

#[test]
fn an_index_cannot_reach_outside_its_directory() {
    for path in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/x.safetensors",
        "./x.safetensors",
        "..",
        "",
        "x",
        "a\\x.safetensors",
    ] {
        let dir = TestDir::new("escape")
            .with("x.safetensors", shard("a"))
            .with(INDEX_FILE, index(json!({"a": path})));
        assert!(
            dir.refusal().contains("is not the name of a safetensors file"),
            "{path}: {}",
            dir.refusal()
        );
    }
}

#[test]
fn a_directory_without_safetensors_says_what_it_has_instead() {
    assert!(TestDir::new("none").refusal().contains("no model.safetensors"));
    assert!(
        TestDir::new("pickle")
            .with("pytorch_model.bin", [])
            .refusal()
            .contains("pickled")
    );
    assert!(TestDir::new("gguf").with("gemma.gguf", []).refusal().contains("GGUF"));
}

proptest! {
    #[test]
    fn any_bytes_are_a_file_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Weights::from_bytes(bytes);
    }

    #[test]
    fn any_header_is_read_or_refused(
        length in prop_oneof![Just(None), any::<u64>().prop_map(Some), (0_u64..300).prop_map(Some)],
        entries in prop::collection::vec(
            ("[ab]{1,2}", prop::collection::vec(any::<u64>(), 0..4), any::<u64>(), any::<u64>(), 0..4_usize),
            0..4,
        ),
        data in prop::collection::vec(any::<u8>(), 0..40),
        flip in any::<prop::sample::Index>(),
        bit in 0_u8..9,
    ) {
        let mut header = Map::new();
        for (name, shape, begin, end, dtype) in entries {
            let dtype = ["F32", "BF16", "F8_E4M3", "Q4"][dtype];
            let small = |value: u64| if value.is_multiple_of(3) { value } else { value % 40 };
            header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [small(begin), small(end)]}));
        }
        let mut bytes = file(&Value::Object(header).to_string(), &data);
        if let Some(length) = length {
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
        let place = flip.index(bytes.len());
        bytes[place] ^= if bit == 8 { 0 } else { 1 << bit };
        // What is accepted must be readable to its last byte.
        if let Ok(weights) = Weights::from_bytes(bytes) {
            let read: usize = weights.iter().map(|(_, tensor)| tensor.data.len()).sum();
            prop_assert_eq!(read as u64, weights.total_bytes());
        }
    }
}
