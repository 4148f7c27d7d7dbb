//! Walks through a grammar before a text is held to it, so that the states of its lexer exist by then.
//!
//! A mask costs ten times as much where a text is the first to come to a state of the lexer. Those states belong to the
//! compiled grammar and are copied with it, so whoever compiles it may build them: off the path of any step. Which texts
//! will come is unknown, but most of what a state costs is not tied to a letter: any text in the grammar will do.

use std::time::{Duration, Instant};

use llguidance::Matcher;
use toktrie::SimpleVob;

/// Masks of all walks of one grammar, at 5 to 10 us each where nothing has to be built.
const MAX_MASKS: usize = 256;

/// A grammar that is dear to walk through is left where it is after so long; one mask more at most. Grammars that people
/// write take 1 to 4 ms.
const MAX_TIME: Duration = Duration::from_millis(5);

/// Tokens of one walk. A JSON string of a bounded length has a state for each length.
const MAX_WALK_TOKENS: usize = 128;

/// A walk that keeps to letters leaves them after so many, on average.
const MEAN_WORD: usize = 16;

/// Tokens that take a text elsewhere in most grammars. Which of a kind makes little difference, so a kind is picked first:
/// else a string would never end, for there are more letters than quotes.
const KINDS: [&[u8]; 9] = [
    LETTERS,
    b"\"",
    b"{[",
    b"}]",
    b":,",
    b" \n",
    b"0159",
    b"-+*/.\\()",
    // The first byte of a letter of two.
    b"\xC3",
];

const LETTERS: &[u8] = b"aenstAZ";

/// The tokens to walk with, by kind; letters first.
#[derive(Debug)]
pub(crate) struct Walker {
    kinds: [Vec<u32>; KINDS.len()],
}

impl Walker {
    /// `words[id]` are the bytes of token `id`.
    pub(crate) fn new(words: &[Vec<u8>]) -> Self {
        let mut of_byte = [None; 256];
        for (id, word) in (0..).zip(words) {
            if let &[byte] = word.as_slice() {
                of_byte[usize::from(byte)].get_or_insert(id);
            }
        }
        let tokens = |bytes: &[u8]| bytes.iter().filter_map(|byte| of_byte[usize::from(*byte)]).collect();
        Self {
            kinds: KINDS.map(tokens),
        }
    }

    /// The same grammar in the same state, with more of its lexer built. The walks are always the same ones.
    pub(crate) fn warm_up(&self, matcher: Matcher) -> Matcher {
        // A lexer that came to its limits stays there. Texts may keep clear of what a walk ran into.
        if matcher.is_stopped() {
            return matcher;
        }
        let warm = matcher.deep_clone();
        match self.walk_about(&warm, MAX_TIME) {
            Some(()) => warm,
            None => matcher,
        }
    }

    /// `None`: the lexer cannot be used any more.
    fn walk_about(&self, matcher: &Matcher, max_time: Duration) -> Option<()> {
        let (mut random, mut num_left) = (Random(1), MAX_MASKS);
        let until = Instant::now() + max_time;
        let mut keeps_to_letters = false;
        while num_left > 0 && Instant::now() < until {
            // Has a place in the grammar of its own, and the lexer in common.
            let mut walking = matcher.clone();
            let walk_ends_at = num_left.saturating_sub(MAX_WALK_TOKENS);
            while num_left > walk_ends_at && !walking.is_stopped() && Instant::now() < until {
                let mask = walking.compute_mask_or_eos().ok()?;
                num_left -= 1;
                let token = self.pick(&mask, keeps_to_letters, &mut random)?;
                walking.consume_token(token).ok()?;
            }
            keeps_to_letters = !keeps_to_letters;
        }
        Some(())
    }

    /// A token of the mask; its first one where there is none of a known kind.
    fn pick(&self, mask: &SimpleVob, keeps_to_letters: bool, random: &mut Random) -> Option<u32> {
        let allowed = |kind: &[u32]| -> Vec<u32> { kind.iter().copied().filter(|id| mask.is_allowed(*id)).collect() };
        let mut kinds: Vec<Vec<u32>> = self.kinds.iter().map(|kind| allowed(kind)).collect();
        let stays = keeps_to_letters && !kinds[0].is_empty() && random.below(MEAN_WORD) > 0;
        kinds.truncate(if stays { 1 } else { KINDS.len() });
        kinds.retain(|kind| !kind.is_empty());
        if kinds.is_empty() {
            return mask.iter().next();
        }
        let kind = &kinds[random.below(kinds.len())];
        Some(kind[random.below(kind.len())])
    }
}

/// Knuth's generator: all that is asked of it is to vary.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let high = self.0 >> 33;
        usize::try_from(high).unwrap_or_default() % bound
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use llguidance::ParserFactory;
    use llguidance::api::TopLevelGrammar;
    use llguidance::earley::SlicedBiasComputer;
    use serde_json::json;
    use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokRxInfo, TokTrie};

    use super::*;

    const EOS: u32 = 256;

    /// All bytes, a stop token, and pieces of the texts below.
    fn words() -> Vec<Vec<u8>> {
        let bytes = (0..=255).map(|byte| vec![byte]);
        let pieces = [
            "<eos>", "{\"", "\":", "na", "me", " \"", "Lady ", "\"}", "12", "34", "the", " quick",
        ];
        bytes
            .chain(pieces.iter().map(|piece| piece.as_bytes().to_vec()))
            .collect()
    }

    fn factory(words: &[Vec<u8>]) -> ParserFactory {
        let num_words = u32::try_from(words.len()).unwrap();
        let trie = TokTrie::from(&TokRxInfo::new(num_words, EOS), words);
        let env: Arc<dyn toktrie::TokenizerEnv + Sync> = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices).unwrap();
        factory.quiet();
        factory
    }

    fn grammars() -> Vec<TopLevelGrammar> {
        let name = json!({ "type": "string", "maxLength": 30 });
        let schema = json!({ "type": "object", "properties": { "name": name }, "required": ["name"], "additionalProperties": false });
        vec![
            TopLevelGrammar::from_json_schema(schema),
            TopLevelGrammar::from_json_schema(json!({ "type": "object" })),
            TopLevelGrammar::from_regex(r"\d{4}-\d{2}|(the|quick| )+"),
            TopLevelGrammar::from_lark("start: expr\nexpr: NUM | \"(\" expr \")\"\nNUM: /[0-9]+/\n".to_owned()),
        ]
    }

    #[test]
    fn a_warm_grammar_allows_what_a_cold_one_does() {
        let words = words();
        let (factory, walker) = (factory(&words), Walker::new(&words));
        for (grammar, index) in grammars().into_iter().zip(0..) {
            let cold = Matcher::new(factory.create_parser(grammar));
            let warm = walker.warm_up(cold.deep_clone());
            for seed in 0..20 {
                let (mut cold, mut warm, mut random) = (cold.deep_clone(), warm.deep_clone(), Random(seed));
                for step in 0..60 {
                    let allowed = cold.compute_mask_or_eos().unwrap();
                    let is_same = warm.compute_mask_or_eos().unwrap().as_slice() == allowed.as_slice();
                    assert!(is_same, "grammar {index}, seed {seed}, step {step}");
                    if cold.is_stopped() {
                        break;
                    }
                    let allowed = allowed.to_list();
                    let token = allowed[random.below(allowed.len())];
                    cold.consume_token(token).unwrap();
                    warm.consume_token(token).unwrap();
                }
            }
        }
    }

    #[test]
    fn a_text_finds_the_lexer_of_a_warm_grammar_built() {
        let words = words();
        let (factory, walker) = (factory(&words), Walker::new(&words));
        let cold = Matcher::new(factory.create_parser(grammars().remove(0)));
        let warm = cold.deep_clone();
        walker.walk_about(&warm, Duration::from_secs(3600)).unwrap();
        // What deriving the lexer's states has cost for this text, without what it had cost before.
        let cost = |mut matcher: Matcher| {
            matcher.invalidate_bias_cache();
            matcher.compute_mask().unwrap();
            let mut sum = 0;
            for byte in br#"{"name":"Lady M""# {
                matcher.consume_token(u32::from(*byte)).unwrap();
                matcher.compute_mask().unwrap();
                sum += matcher.last_step_stats().unwrap().lexer_cost;
            }
            sum
        };
        let (cold, warm) = (cost(cold), cost(warm));
        assert!(warm * 10 < cold, "{warm} and {cold}");
    }

    #[test]
    fn a_grammar_that_takes_too_much_to_walk_through_is_left_as_it_was() {
        let words = words();
        let (mut factory, walker) = (factory(&words), Walker::new(&words));
        factory.limits_mut().max_lexer_states = 40;
        let regex = TopLevelGrammar::from_regex("[ab]*a[abn]{20}|[0-9]{30}");
        let cold = Matcher::new(factory.create_parser(regex));
        assert!(
            walker
                .walk_about(&cold.deep_clone(), Duration::from_secs(3600))
                .is_none()
        );
        let mut warm = walker.warm_up(cold);
        assert!(warm.compute_mask().is_ok(), "{:?}", warm.get_error());
    }
}
