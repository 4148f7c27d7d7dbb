//! Prints what a token, a prompt and a load cost: `cargo bench -p lapidary-text`.
//!
//! The vocabulary is made up but has Gemma-2's size: the small one of the tests, grown by merges to 256,000 tokens.
#![expect(clippy::print_stdout, reason = "printing is what a benchmark is for")]
#![expect(clippy::unwrap_used, reason = "a benchmark may end at the first surprise")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use lapidary_text::{ChatTemplate, Detokenizer, Message, PromptEnd, StopMatcher, SystemRole, Tokenizer};
use serde_json::{Value, json};

const TINY_JSON: &[u8] = include_bytes!("../tests/tiny/tokenizer.json");
const TINY_CONFIG: &[u8] = include_bytes!("../tests/tiny/tokenizer_config.json");
const VOCAB_SIZE: usize = 256_000;
const PROMPT_BYTES: usize = 400_000;

fn main() {
    let json = grown_json();
    let (tokenizer, elapsed) = timed(|| Tokenizer::from_bytes(&json, Some(TINY_CONFIG)).unwrap());
    let (_, library_elapsed) = timed(|| tokenizers::Tokenizer::from_bytes(&json).unwrap());
    println!(
        "load {} tokens, {} MB of JSON: {elapsed:.1?} (the library's part: {library_elapsed:.1?})",
        tokenizer.vocab_size(),
        json.len() / 1_000_000
    );

    encode(&tokenizer, "prose", "the quick brown fox jumps over the lazy dog. ");
    encode(&tokenizer, "one letter", "a");
    encode(&tokenizer, "spaces", " ");
    encode(&tokenizer, "line feeds", "x\n\n");
    encode(&tokenizer, "special tokens", "<bos>");
    encode(&tokenizer, "half special tokens", "<start_of_turn");
    encode(&tokenizer, "unknown characters", "𒀀");

    stream(&tokenizer);
    chat(&tokenizer);
}

fn encode(tokenizer: &Tokenizer, name: &str, unit: &str) {
    let text = unit.repeat(PROMPT_BYTES / unit.len());
    let (ids, elapsed) = timed(|| tokenizer.encode(&text, true).unwrap());
    let prompt = Message::new("user", text);
    let template = ChatTemplate::from_config(TINY_CONFIG, tokenizer, SystemRole::Merge)
        .unwrap()
        .unwrap();
    let (rendered, render_elapsed) = timed(|| template.render(&[prompt], PromptEnd::GenerationPrompt).unwrap());
    let (_, rendered_elapsed) = timed(|| tokenizer.encode_rendered(&rendered).unwrap());
    println!(
        "encode 400 KB of {name} ({} tokens): {elapsed:.1?}; as a chat: render {render_elapsed:.1?}, encode {rendered_elapsed:.1?}",
        ids.len()
    );
}

fn stream(tokenizer: &Tokenizer) {
    const NUM_TOKENS: u32 = 2_000_000;
    let vocab_size = u32::try_from(tokenizer.vocab_size()).unwrap();
    // A stride coprime to the vocabulary visits it all, so that the table does not sit in a small cache.
    let ids: Vec<u32> = (0..NUM_TOKENS)
        .map(|step| step.wrapping_mul(7919) % vocab_size)
        .collect();
    let mut out = String::with_capacity(1 << 16);
    let (_, elapsed) = timed(|| {
        let mut detokenizer = Detokenizer::new(tokenizer, true);
        for id in &ids {
            out.clear();
            black_box(detokenizer.push(*id, &mut out));
        }
    });
    println!("detokenize: {:.1} ns a token", nanos(elapsed, NUM_TOKENS));

    let stops = ["\n\nUser:", "\n\nAssistant:", "<|im_end|>", "###"];
    let mut delta = String::new();
    let (_, elapsed) = timed(|| {
        let mut detokenizer = Detokenizer::new(tokenizer, true);
        let mut matcher = StopMatcher::new(&stops, false).unwrap();
        for id in &ids {
            delta.clear();
            out.clear();
            detokenizer.push(*id, &mut delta);
            black_box(matcher.push(&delta, &mut out));
        }
    });
    println!(
        "detokenize and match {} stop strings: {:.1} ns a token",
        stops.len(),
        nanos(elapsed, NUM_TOKENS)
    );
}

fn chat(tokenizer: &Tokenizer) {
    const NUM_RENDERS: u32 = 2_000;
    let template = ChatTemplate::from_config(TINY_CONFIG, tokenizer, SystemRole::Merge)
        .unwrap()
        .unwrap();
    let turn = |index| {
        Message::new(
            if index % 2 == 0 { "user" } else { "assistant" },
            "the quick brown fox ".repeat(10),
        )
    };
    let messages: Vec<Message> = (0..9).map(turn).collect();
    let (_, elapsed) = timed(|| {
        for _ in 0..NUM_RENDERS {
            black_box(template.render(&messages, PromptEnd::GenerationPrompt).unwrap());
        }
    });
    println!(
        "render 9 messages of 200 bytes: {:.1} us",
        nanos(elapsed, NUM_RENDERS) / 1000.0
    );
    let prompt = template.render(&messages, PromptEnd::GenerationPrompt).unwrap();
    let (_, elapsed) = timed(|| {
        for _ in 0..NUM_RENDERS {
            black_box(tokenizer.encode_rendered(&prompt).unwrap());
        }
    });
    println!("encode them: {:.1} us", nanos(elapsed, NUM_RENDERS) / 1000.0);
}

fn grown_json() -> Vec<u8> {
    let mut json: Value = serde_json::from_slice(TINY_JSON).unwrap();
    let first_text = 256 + json["model"]["vocab"]["<0x00>"].as_u64().unwrap();
    let is_text = |(piece, id): (&String, &Value)| (id.as_u64() >= Some(first_text)).then(|| piece.clone());
    let mut pieces: Vec<String> = json["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .filter_map(is_text)
        .collect();
    let (num_added, mut state) = (VOCAB_SIZE - json["model"]["vocab"].as_object().unwrap().len(), 1_u64);
    let mut random = |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(state >> 33).unwrap() % bound
    };
    let mut num_left = num_added;
    while num_left > 0 {
        let (left, right) = (
            pieces[random(pieces.len())].clone(),
            pieces[random(pieces.len().min(400))].clone(),
        );
        let piece = format!("{left}{right}");
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        if piece.len() <= 24 && !vocab.contains_key(&piece) {
            vocab.insert(piece.clone(), json!(VOCAB_SIZE - num_left));
            json["model"]["merges"]
                .as_array_mut()
                .unwrap()
                .push(json!([left, right]));
            pieces.push(piece);
            num_left -= 1;
        }
    }
    serde_json::to_vec(&json).unwrap()
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed())
}

fn nanos(elapsed: Duration, count: u32) -> f64 {
    elapsed.as_secs_f64() * 1e9 / f64::from(count)
}
