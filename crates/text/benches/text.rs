//! Prints what a token, a prompt, a mask and a load cost: `cargo bench -p lapidary-text`.
//!
//! The vocabulary is made up but has Gemma-2's size: the small one of the tests, grown by merges to 256,000 tokens.
#![expect(clippy::print_stdout, reason = "printing is what a benchmark is for")]
#![expect(clippy::unwrap_used, reason = "a benchmark may end at the first surprise")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use lapidary_text::{
    ChatTemplate, Detokenizer, Grammar, GrammarCompiler, Message, PromptEnd, StopMatcher, SystemRole, Tokenizer,
};
use serde_json::{Value, json};

const TINY_JSON: &[u8] = include_bytes!("../tests/tiny/tokenizer.json");
const TINY_CONFIG: &[u8] = include_bytes!("../tests/tiny/tokenizer_config.json");
const VOCAB_SIZE: usize = 256_000;
const PROMPT_BYTES: usize = 400_000;
/// One in so many pieces with a quote or a backslash is kept.
const RARITY: usize = 20;

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
    masks(&tokenizer);
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

/// Masks of texts that models write: of every token of a text, for as many requests as there are runs. Each starts with
/// the compiled grammar as any request does: nothing that an earlier one built is left.
fn masks(tokenizer: &Tokenizer) {
    const NUM_RUNS: usize = 20;
    let (compiler, elapsed) = timed(|| GrammarCompiler::new(tokenizer, VOCAB_SIZE, &[1, 107]).unwrap());
    println!("index the vocabulary for grammars: {elapsed:.1?}");
    let person = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age", "tags", "kind", "address"],
        "properties": {
            "name": { "type": "string", "minLength": 1, "maxLength": 60 },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "tags": { "type": "array", "items": { "type": "string" }, "maxItems": 5 },
            "kind": { "enum": ["person", "company", "other"] },
            "address": { "type": "object", "additionalProperties": false, "required": ["street", "zip"],
                         "properties": { "street": { "type": "string" }, "zip": { "type": "string", "pattern": "^[0-9]{5}$" } } },
        },
    });
    let sum = "start: expr\nexpr: term ((\"+\" | \"-\") term)*\nterm: atom ((\"*\" | \"/\") atom)*\natom: NUM | \"(\" expr \")\"\n\
               NUM: /[0-9]+(\\.[0-9]+)?/\n%ignore /[ ]+/\n";
    let cases = [
        (
            "a JSON schema",
            Grammar::JsonSchema(person),
            r#"{"name": "Ada Lovelace of London", "age": 36, "tags": ["the quick brown fox", "lazy dogs"], "kind": "person", "address": {"street": "12 over the lazy dog street", "zip": "10115"}}"#,
        ),
        (
            "any JSON object",
            Grammar::JsonObject,
            r#"{"a": [1, 2.5e10, null, true], "some longer key": {"nested": "the quick brown fox jumps over"}, "z": "é"}"#,
        ),
        (
            "a date",
            Grammar::Regex(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z".to_owned()),
            "2026-11-23T09:12:00Z",
        ),
        (
            "a Lark grammar",
            Grammar::Lark(sum.to_owned()),
            "(1 + 2.5) * 3 - (4 / (5 + 6) * 7)",
        ),
    ];
    for (name, grammar, text) in cases {
        let (state, compile_elapsed) = timed(|| compiler.compile(&grammar).unwrap());
        let ids = tokenizer.encode(text, false).unwrap();
        let (_, copy_elapsed) = timed(|| state.clone());
        let mut mask_times = Vec::new();
        let mut advance_time = Duration::ZERO;
        for _ in 0..NUM_RUNS {
            let mut state = state.clone();
            for &id in &ids {
                let (mask, elapsed) = timed(|| state.allowed_tokens().unwrap().unwrap());
                mask_times.push(elapsed);
                assert!(
                    mask[id as usize / 32] >> (id % 32) & 1 == 1,
                    "{name}: {:?}",
                    tokenizer.token_str(id)
                );
                advance_time += timed(|| state.advance(id).unwrap()).1;
            }
            assert!(state.may_end(), "{name}");
        }
        mask_times.sort_unstable();
        let percentile = |percent: usize| mask_times[(mask_times.len() - 1) * percent / 100];
        println!(
            "masks of {name}: compile {compile_elapsed:.1?}, copy {copy_elapsed:.1?}; {NUM_RUNS} texts of {} tokens, {} masks: p50 {:.1?}, p99 {:.1?}, worst {:.1?}; taking a token in {:.1?}",
            ids.len(),
            mask_times.len(),
            percentile(50),
            percentile(99),
            percentile(100),
            advance_time / u32::try_from(mask_times.len()).unwrap()
        );
    }
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
        // As in a real vocabulary, few pieces hold what a JSON string has to escape.
        let is_rare = piece.contains(['"', '\\']) && random(RARITY) > 0;
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        if !is_rare && piece.len() <= 24 && !vocab.contains_key(&piece) {
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
