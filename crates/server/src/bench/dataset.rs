//! Prompts: random tokens, or the records of a file.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::client::Client;
use super::{BenchArgs, DatasetName, is_chat};

/// Random prompts are made of the tokens of these words: they exist in every vocabulary.
const WORDS: &str = "time year people way day man thing woman life child world school state family student group country \
                     problem hand part place case week company system program question work government number night \
                     point home water room mother area money story fact month lot right study book eye job word";

/// Tokens of an answer where a file says nothing about it.
const DEFAULT_OUTPUT_LEN: u32 = 128;

/// Bytes of a token, roughly, where the server cannot be asked.
const BYTES_PER_TOKEN: usize = 4;

/// One request to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) prompt: Prompt,
    /// Tokens at most.
    pub(super) output_len: u32,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Prompt {
    /// Token ids.
    Tokens(Vec<u32>),
    /// Text.
    Text(String),
}

/// Why a data set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// Of `--dataset-path`.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Neither JSON nor JSON lines.
    #[error("record {index} of {} is no JSON object", path.display())]
    Malformed {
        /// Of `--dataset-path`.
        path: PathBuf,
        /// Counted from 0.
        index: usize,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// No record has a prompt.
    #[error("no record of {} has a prompt, messages or conversations", path.display())]
    Empty {
        /// Of `--dataset-path`.
        path: PathBuf,
    },
}

/// Repeatable numbers (splitmix64).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// In `0..1`.
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
    pub(super) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// In `0..limit`.
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// `length`, give or take a share of it, and at least 1.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "lengths are small"
    )]
    fn length(&mut self, length: u32, ratio: f64) -> u32 {
        let factor = 1.0 + ratio * (2.0 * self.uniform() - 1.0);
        ((f64::from(length) * factor).round() as u32).max(1)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            items.swap(index, self.below(index + 1));
        }
    }
}

/// All requests of a run.
pub(super) async fn samples(args: &BenchArgs, client: &Client) -> Result<Vec<Sample>, DatasetError> {
    let mut random = Random::new(args.seed);
    match (args.dataset_name, &args.dataset_path) {
        (DatasetName::File, Some(path)) => from_file(args, client, path, &mut random).await,
        _ => Ok(random_samples(args, client, &mut random).await),
    }
}

async fn random_samples(args: &BenchArgs, client: &Client, random: &mut Random) -> Vec<Sample> {
    let pool = tokenize(client, WORDS).await.filter(|ids| !ids.is_empty());
    let words: Vec<_> = WORDS.split_whitespace().collect();
    let prefix: Vec<_> = (0..args.random_prefix_len).map(|_| random.next()).collect();
    let mut samples = Vec::with_capacity(args.num_prompts as usize);
    for _ in 0..args.num_prompts {
        let input_len = random.length(args.random_input_len, args.random_range_ratio);
        let output_len = random.length(args.random_output_len, args.random_range_ratio);
        let draws: Vec<_> = (0..input_len).map(|_| random.next()).collect();
        let draws = prefix
            .iter()
            .chain(&draws)
            .map(|draw| usize::try_from(draw >> 32).unwrap_or(0));
        let prompt = match &pool {
            Some(pool) => {
                let ids: Vec<u32> = draws.map(|draw| pool[draw % pool.len()]).collect();
                match is_chat(args) {
                    false => Prompt::Tokens(ids),
                    true => Prompt::Text(detokenize(client, &ids).await.unwrap_or_default()),
                }
            }
            None => Prompt::Text(
                draws
                    .map(|draw| words[draw % words.len()])
                    .collect::<Vec<_>>()
                    .join(" "),
            ),
        };
        samples.push(Sample { prompt, output_len });
    }
    samples
}

async fn from_file(
    args: &BenchArgs,
    client: &Client,
    path: &Path,
    random: &mut Random,
) -> Result<Vec<Sample>, DatasetError> {
    let text = std::fs::read_to_string(path).map_err(|source| DatasetError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let mut records: Vec<_> = parse(path, &text)?.into_iter().filter_map(Record::turn).collect();
    if records.is_empty() {
        return Err(DatasetError::Empty { path: path.to_owned() });
    }
    random.shuffle(&mut records);
    let mut samples = Vec::with_capacity(args.num_prompts as usize);
    // A short file is read again from its beginning.
    for turn in records.iter().cycle().take(args.num_prompts as usize) {
        let output_len = match (turn.output_len, &turn.answer) {
            (Some(length), _) => length,
            (None, Some(answer)) => count_tokens(client, answer).await,
            (None, None) => DEFAULT_OUTPUT_LEN,
        };
        samples.push(Sample {
            prompt: Prompt::Text(turn.prompt.clone()),
            output_len: output_len.max(1),
        });
    }
    Ok(samples)
}

/// A record in one of the forms that are around.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Record {
    #[serde(alias = "conversation", alias = "messages")]
    conversations: Vec<Message>,
    prompt: Option<String>,
    #[serde(alias = "response")]
    completion: Option<String>,
    #[serde(alias = "output_len", alias = "max_tokens")]
    output_tokens: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    #[serde(alias = "value")]
    content: String,
}

/// A question, and what is known of its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Turn {
    prompt: String,
    answer: Option<String>,
    output_len: Option<u32>,
}

impl Record {
    /// Its first question and the answer to it.
    fn turn(self) -> Option<Turn> {
        let mut messages = self.conversations.into_iter().map(|message| message.content);
        let prompt = self
            .prompt
            .or_else(|| messages.next())
            .filter(|prompt| !prompt.is_empty())?;
        Some(Turn {
            prompt,
            answer: self.completion.or_else(|| messages.next()),
            output_len: self.output_tokens,
        })
    }
}

fn parse(path: &Path, text: &str) -> Result<Vec<Record>, DatasetError> {
    let malformed = |index, source| DatasetError::Malformed {
        path: path.to_owned(),
        index,
        source,
    };
    if text.trim_start().starts_with('[') {
        return serde_json::from_str(text).map_err(|source| malformed(0, source));
    }
    let lines = text.lines().filter(|line| !line.trim().is_empty()).enumerate();
    lines
        .map(|(index, line)| serde_json::from_str(line).map_err(|source| malformed(index, source)))
        .collect()
}

async fn count_tokens(client: &Client, text: &str) -> u32 {
    let count = match tokenize(client, text).await {
        Some(ids) => ids.len(),
        None => text.len().div_ceil(BYTES_PER_TOKEN),
    };
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// `None` where the server has no such endpoint.
async fn tokenize(client: &Client, text: &str) -> Option<Vec<u32>> {
    let body = json!({ "prompt": text, "add_special_tokens": false });
    let answer = client.post("/tokenize", &body).await.ok()?;
    let ids = answer["tokens"].as_array()?.iter().map(Value::as_u64);
    ids.map(|id| u32::try_from(id?).ok()).collect()
}

async fn detokenize(client: &Client, ids: &[u32]) -> Option<String> {
    let answer = client.post("/detokenize", &json!({ "tokens": ids })).await.ok()?;
    answer["prompt"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(text: &str) -> Vec<Turn> {
        let records = parse(Path::new("x"), text).unwrap();
        records.into_iter().filter_map(Record::turn).collect()
    }

    fn turn(prompt: &str, answer: Option<&str>, output_len: Option<u32>) -> Turn {
        Turn {
            prompt: prompt.to_owned(),
            answer: answer.map(str::to_owned),
            output_len,
        }
    }

    #[test]
    fn records_are_read_in_every_form_that_is_around() {
        let sharegpt = r#"[{"id": "1", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
                           {"conversations": []}]"#;
        assert_eq!(turns(sharegpt), [turn("hi", Some("ho"), None)]);
        let lines = concat!(
            "{\"prompt\": \"a\", \"output_tokens\": 7}\n\n",
            "{\"prompt\": \"b\", \"completion\": \"c\"}\n",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"d\"}]}\n",
        );
        let expected = [
            turn("a", None, Some(7)),
            turn("b", Some("c"), None),
            turn("d", None, None),
        ];
        assert_eq!(turns(lines), expected);
        let broken = parse(Path::new("x"), "{\"prompt\": \"a\"}\nnonsense\n");
        assert!(matches!(broken, Err(DatasetError::Malformed { index: 1, .. })));
    }

    #[test]
    fn random_lengths_keep_their_bounds_and_mean() {
        let mut random = Random::new(1);
        let lengths: Vec<_> = (0..10_000).map(|_| random.length(100, 0.5)).collect();
        assert!(lengths.iter().all(|length| (50..=150).contains(length)));
        let mean = lengths.iter().sum::<u32>() / 10_000;
        assert!((98..=102).contains(&mean), "{mean}");
        assert_eq!((random.length(100, 0.0), random.length(0, 0.0)), (100, 1));
    }

    #[test]
    fn a_shuffle_keeps_everything_and_depends_on_the_seed() {
        let shuffled = |seed| {
            let mut items: Vec<_> = (0..100).collect();
            Random::new(seed).shuffle(&mut items);
            items
        };
        assert_eq!(shuffled(1), shuffled(1));
        assert_ne!(shuffled(1), shuffled(2));
        let mut sorted = shuffled(3);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
    }
}
