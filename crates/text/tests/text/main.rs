//! The crate from outside, against the `tokenizers` library as the oracle.
#![expect(
    clippy::unwrap_used,
    reason = "clippy takes the functions that tests share for production code"
)]

mod chat;
mod detokenizer;
mod front_doors;
mod grammar;
mod hostile;
mod references;
mod schemas;
mod stop;
mod tokenizer;
mod variables;

use std::sync::LazyLock;

use lapidary_text::{ChatTemplate, SystemRole, Tokenizer};
use proptest::prelude::*;

const TINY_JSON: &[u8] = include_bytes!("../tiny/tokenizer.json");
const TINY_CONFIG: &[u8] = include_bytes!("../tiny/tokenizer_config.json");

/// A small tokenizer of Gemma's kind; `tests/tiny/make.py` made it.
static TINY: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_bytes(TINY_JSON, Some(TINY_CONFIG)).unwrap());

/// The same file in the library's hands.
static ORACLE: LazyLock<tokenizers::Tokenizer> =
    LazyLock::new(|| tokenizers::Tokenizer::from_bytes(TINY_JSON).unwrap());

fn oracle_encode(text: &str, add_special_tokens: bool) -> Vec<u32> {
    ORACLE.encode(text, add_special_tokens).unwrap().get_ids().to_vec()
}

fn gemma(system_role: SystemRole) -> ChatTemplate {
    ChatTemplate::from_config(TINY_CONFIG, &TINY, system_role)
        .unwrap()
        .unwrap()
}

fn id(token: &str) -> u32 {
    TINY.token_to_id(token).unwrap()
}

/// Text without special tokens: words of the vocabulary, white space of every kind, letters it has never seen.
fn plain_text() -> impl Strategy<Value = String> {
    let fragment = prop_oneof![
        4 => prop::sample::select(vec![
            "the", " quick", " brown", "hello world", "\n", "\n\n", "\n\n\n", " ", "  ", "   ", "\t", "▁", "▁▁", "<b>", "<h1>",
            "<unused7>", "<mask>", "<", ">", "<start_of_turn", "end_of_turn>", "<0x41>", "größe", "東京", "наука", "é", "🤗", "👩‍👧",
            "\u{0}", "\u{FFFD}", "user\n", "model\n",
        ]).prop_map(str::to_owned),
        1 => "\\PC{0,6}",
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(fragment, 0..12)
        .prop_map(|fragments| fragments.concat())
        .prop_filter("a special token may come together by chance", |text| {
            !mentions_special(text)
        })
}

const SPECIAL: [&str; 6] = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"];

fn mentions_special(text: &str) -> bool {
    SPECIAL.iter().any(|special| text.contains(special))
}

/// Text that may contain special tokens anywhere.
fn any_text() -> impl Strategy<Value = String> {
    let fragment = prop_oneof![
        plain_text(),
        prop::sample::select(SPECIAL.to_vec()).prop_map(str::to_owned)
    ];
    prop::collection::vec(fragment, 0..6).prop_map(|fragments| fragments.concat())
}

/// Ids inside and outside the vocabulary, rich in bytes, so that byte runs of every shape occur.
fn any_ids() -> impl Strategy<Value = Vec<u32>> {
    let byte_id = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| id(&format!("<0x{byte:02X}>")))
            .collect::<Vec<_>>()
    };
    let chunk = prop_oneof![
        3 => (0..800_u32).prop_map(|id| vec![id]),
        2 => prop::sample::select(vec!["é", "東", "🤗", "a", "\u{FFFD}"]).prop_map(move |text| byte_id(text.as_bytes())),
        2 => any::<u8>().prop_map(move |byte| byte_id(&[byte])),
        1 => prop::sample::select(vec![0, 1, 2, 106, 107, 700, u32::MAX]).prop_map(|id| vec![id]),
    ];
    prop::collection::vec(chunk, 0..24).prop_map(|chunks| chunks.concat())
}
