//! What an answer is held to, token by token: its grammar, the tokens it may use, the words it must not say.

use std::collections::HashMap;
use std::iter::repeat_n;
use std::sync::Arc;

use lapidary_engine::{Allowed, ConstraintError, TokenConstraint, TokenId, TokenMask};
use lapidary_text::{GrammarError, GrammarState};

/// As many answers get a grammar each where they are: half a millisecond, since the last takes the one that is there.
const MAX_INLINE_COPIES: usize = 4;

/// Which tokens may come, whatever the grammar; the same for all answers of a request.
#[derive(Debug)]
pub(crate) struct TokenRules {
    /// What may always come but for the ends of banned sequences.
    allowed: TokenMask,
    /// Banned sequences of several tokens, by the last token but one.
    sequences: HashMap<TokenId, Vec<Vec<TokenId>>>,
    /// Tokens that decide which sequences would be completed: as many as the longest has before its last.
    num_relevant: usize,
    /// What may come where rules and grammar leave nothing else.
    stop_token_ids: Arc<[TokenId]>,
}

impl TokenRules {
    /// Rules of a vocabulary: only tokens of `allowed`, if there are any, and none that completes one of `banned`.
    pub(crate) fn new(
        vocab_size: u32,
        allowed: Option<&[TokenId]>,
        banned: Vec<Vec<TokenId>>,
        stop_token_ids: Arc<[TokenId]>,
    ) -> Self {
        let mut words = vec![0; vocab_size.div_ceil(32) as usize];
        match allowed {
            Some(allowed) => allowed.iter().for_each(|&token| set(&mut words, token)),
            None => (0..vocab_size).for_each(|token| set(&mut words, token)),
        }
        let mut sequences: HashMap<TokenId, Vec<Vec<TokenId>>> = HashMap::new();
        let mut num_relevant = 0;
        for sequence in banned {
            match *sequence.as_slice() {
                [] => {}
                [token] => clear(&mut words, token),
                [.., before, _] => {
                    num_relevant = num_relevant.max(sequence.len() - 1);
                    sequences.entry(before).or_default().push(sequence);
                }
            }
        }
        Self {
            allowed: words.into(),
            sequences,
            num_relevant,
            stop_token_ids,
        }
    }

    /// Whether what may come does not depend on what came.
    fn is_fixed(&self) -> bool {
        self.sequences.is_empty()
    }

    /// The tokens that would complete a banned sequence after `recent`.
    fn banned_after<'a>(&'a self, recent: &'a [TokenId]) -> impl Iterator<Item = TokenId> + 'a {
        let candidates = recent.last().and_then(|last| self.sequences.get(last));
        candidates.into_iter().flatten().filter_map(|sequence| {
            let (last, before) = sequence.split_last()?;
            recent.ends_with(before).then_some(*last)
        })
    }

    /// Where nothing else is left, an answer that may end does.
    fn only_stops(&self, form: &[u32]) -> TokenMask {
        let mut words = vec![0; form.len()];
        let stops = self.stop_token_ids.iter().filter(|token| is_set(form, **token));
        stops.for_each(|&token| set(&mut words, token));
        words.into()
    }
}

/// One answer, held to a grammar, to rules, or to both.
#[derive(Debug, Clone)]
pub(crate) struct AnswerConstraint {
    /// Gone where the text is free of it.
    grammar: Option<GrammarState>,
    rules: Option<Arc<TokenRules>>,
    /// The newest tokens of the answer, as many as the rules look at.
    recent: Vec<TokenId>,
}

impl AnswerConstraint {
    /// `None` if nothing is asked for.
    pub(crate) fn new(grammar: Option<GrammarState>, rules: Option<TokenRules>) -> Option<Self> {
        let is_held = grammar.is_some() || rules.is_some();
        is_held.then(|| Self {
            grammar,
            rules: rules.map(Arc::new),
            recent: Vec::new(),
        })
    }

    /// One for each answer.
    pub(crate) fn copies(self, num_answers: usize) -> Vec<Self> {
        repeat_n(self, num_answers).collect()
    }

    /// Whether others should not have to wait for [`copies`](Self::copies).
    pub(crate) fn is_long(&self, num_answers: usize) -> bool {
        self.grammar.is_some() && num_answers > MAX_INLINE_COPIES
    }
}

impl TokenConstraint for AnswerConstraint {
    fn advance(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        let num_relevant = self.rules.as_ref().map_or(0, |rules| rules.num_relevant);
        if num_relevant > 0 {
            if self.recent.len() == num_relevant {
                self.recent.remove(0);
            }
            self.recent.push(token);
        }
        self.grammar
            .as_mut()
            .map_or(Ok(()), |grammar| grammar.advance(token).map_err(failed))
    }

    fn allowed_tokens(&mut self) -> Result<Allowed, ConstraintError> {
        let form = match &mut self.grammar {
            Some(grammar) => grammar.allowed_tokens().map_err(failed)?,
            None => None,
        };
        if form.is_none() {
            self.grammar = None;
        }
        let Some(rules) = &self.rules else {
            return Ok(form.map_or(Allowed::Anything, Allowed::Next));
        };
        let mut mask = match &form {
            None if rules.is_fixed() => return Ok(Allowed::Always(Arc::clone(&rules.allowed))),
            None => Arc::clone(&rules.allowed),
            Some(form) => form.iter().zip(&*rules.allowed).map(|(a, b)| a & b).collect(),
        };
        for token in rules.banned_after(&self.recent) {
            // Copies the mask once, and only where a sequence is about to be completed.
            clear(Arc::make_mut(&mut mask), token);
        }
        if let Some(form) = form.filter(|_| mask.iter().all(|word| *word == 0)) {
            mask = rules.only_stops(&form);
        }
        Ok(Allowed::Next(mask))
    }

    fn fork(&self) -> Box<dyn TokenConstraint> {
        Box::new(self.clone())
    }
}

fn failed(error: GrammarError) -> ConstraintError {
    ConstraintError::Failed(error.into())
}

fn set(words: &mut [u32], token: TokenId) {
    words[token as usize / 32] |= 1 << (token % 32);
}

/// Tokens beyond the vocabulary are never allowed.
fn clear(words: &mut [u32], token: TokenId) {
    if let Some(word) = words.get_mut(token as usize / 32) {
        *word &= !(1 << (token % 32));
    }
}

fn is_set(words: &[u32], token: TokenId) -> bool {
    words
        .get(token as usize / 32)
        .is_some_and(|word| word >> (token % 32) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lapidary_text::{Grammar, GrammarCompiler, Tokenizer};

    use super::*;

    const VOCAB_SIZE: u32 = 70;

    fn held(allowed: Option<&[TokenId]>, banned: &[&[TokenId]]) -> AnswerConstraint {
        let banned = banned.iter().map(|sequence| sequence.to_vec()).collect();
        let rules = TokenRules::new(VOCAB_SIZE, allowed, banned, Arc::from([1]));
        AnswerConstraint::new(None, Some(rules)).unwrap()
    }

    fn banned_now(constraint: &mut AnswerConstraint) -> Vec<TokenId> {
        let allowed = constraint.allowed_tokens().unwrap();
        let mask = allowed.mask().unwrap();
        assert_eq!(mask.len(), 3);
        let banned = (0..96).filter(|token| !is_set(mask, *token));
        banned.filter(|token| *token < VOCAB_SIZE).collect()
    }

    #[test]
    fn allowed_tokens_alone_are_said_once_for_all() {
        let mut constraint = held(Some(&[69, 3, 3]), &[]);
        let Allowed::Always(mask) = constraint.allowed_tokens().unwrap() else {
            panic!("the mask never changes");
        };
        assert_eq!(*mask, [1 << 3, 0, 1 << 5]);
        assert!(matches!(
            held(None, &[&[4], &[]]).allowed_tokens().unwrap(),
            Allowed::Always(mask) if *mask == [!(1 << 4), u32::MAX, 0b11_1111]
        ));
    }

    #[test]
    fn a_sequence_is_banned_where_it_would_be_completed() {
        let mut constraint = held(None, &[&[5], &[7, 8], &[7, 7, 9], &[2, 7, 10]]);
        let mut after = |token: Option<TokenId>| {
            token.into_iter().for_each(|token| constraint.advance(token).unwrap());
            banned_now(&mut constraint)
        };
        assert_eq!(after(None), [5]);
        assert_eq!(after(Some(7)), [5, 8]);
        assert_eq!(after(Some(7)), [5, 8, 9]);
        assert_eq!(after(Some(3)), [5]);
        assert_eq!(after(Some(2)), [5]);
        assert_eq!(after(Some(7)), [5, 8, 10]);
        assert_eq!(after(Some(7)), [5, 8, 9]);
    }

    #[test]
    fn a_mask_is_copied_only_to_ban_the_end_of_a_sequence() {
        let mut constraint = held(None, &[&[7, 8]]);
        let shared = Arc::clone(&constraint.rules.as_ref().unwrap().allowed);
        let is_shared = |allowed: &Allowed| Arc::ptr_eq(allowed.mask().unwrap(), &shared);
        assert!(is_shared(&constraint.allowed_tokens().unwrap()));
        constraint.advance(7).unwrap();
        assert!(!is_shared(&constraint.allowed_tokens().unwrap()));
        let mut other = constraint.clone();
        other.advance(8).unwrap();
        assert!(is_shared(&other.allowed_tokens().unwrap()));
        assert_eq!(banned_now(&mut constraint), [8], "each answer has what it said itself");
    }

    #[test]
    fn many_copies_of_a_grammar_are_long_work() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../text/tests/tiny");
        let tokenizer = Tokenizer::load(&folder).unwrap();
        let compiler = GrammarCompiler::new(&tokenizer, tokenizer.vocab_size(), &[1]).unwrap();
        let grammar = compiler.compile(&Grammar::Regex("ab".to_owned())).unwrap();
        let held_to_grammar = AnswerConstraint::new(Some(grammar), None).unwrap();
        assert!(held_to_grammar.is_long(MAX_INLINE_COPIES + 1));
        assert!(!held_to_grammar.is_long(MAX_INLINE_COPIES));
        // Rules are shared.
        assert!(!held(None, &[&[7, 8]]).is_long(128));
    }

    #[test]
    fn no_rules_and_no_grammar_are_no_constraint() {
        assert!(AnswerConstraint::new(None, None).is_none());
    }
}
