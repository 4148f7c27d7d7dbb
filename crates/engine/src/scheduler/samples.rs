//! The sampled rows of a batch, written over those of the batch before.

use std::sync::Arc;

use crate::{SampleRow, SamplingParams};

/// Rows of one batch, in the places of the last one's.
///
/// Most sequences have a row in every step. One that finds its old row keeps the reference to its parameters: to count
/// one down and another up would wait until all that was written before, block tables above all, is out of the core.
#[derive(Debug)]
pub(super) struct SampleRows {
    /// The first `len` are new.
    rows: Vec<SampleRow>,
    len: usize,
}

impl SampleRows {
    pub(super) fn over(last: Vec<SampleRow>) -> Self {
        Self { rows: last, len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Appends a row that chooses freely.
    pub(super) fn push(&mut self, row: u32, position: u32, params: &Arc<SamplingParams>) -> &mut SampleRow {
        self.make_room(params);
        let sample = &mut self.rows[self.len];
        self.len += 1;
        // One by one: a row built elsewhere is copied in larger pieces than it was written in, and waits as well.
        sample.row = row;
        sample.position = position;
        sample.given = None;
        sample.banned = None;
        sample.mask = None;
        sample.history = None;
        sample
    }

    pub(super) fn finish(mut self) -> Vec<SampleRow> {
        self.rows.truncate(self.len);
        self.rows
    }

    /// Makes the next place one of these parameters.
    fn make_room(&mut self, params: &Arc<SamplingParams>) {
        let has_params = |sample: &SampleRow| Arc::ptr_eq(&sample.params, params);
        match &mut self.rows[self.len..] {
            [] => self.rows.push(SampleRow {
                row: 0,
                position: 0,
                given: None,
                params: Arc::clone(params),
                banned: None,
                mask: None,
                history: None,
            }),
            [place, ..] if has_params(place) => {}
            // The row of a sequence that ended is in between: it moves on, up to the end.
            [place, next, ..] if has_params(next) => std::mem::swap(place, next),
            [place, ..] => place.params = Arc::clone(params),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(last: Vec<SampleRow>, sequences: &[&Arc<SamplingParams>]) -> Vec<SampleRow> {
        let mut rows = SampleRows::over(last);
        for (index, params) in sequences.iter().enumerate() {
            let sample = rows.push(index as u32, 7, params);
            assert!(sample.given.is_none() && sample.banned.is_none());
            assert!(sample.mask.is_none() && sample.history.is_none());
            // What the next step must not find.
            sample.given = Some(1);
            sample.banned = Some(Arc::from([2]));
            sample.mask = Some(Arc::from([3]));
            assert_eq!(rows.len(), index + 1);
        }
        let rows = rows.finish();
        assert_eq!(rows.len(), sequences.len());
        for (index, (sample, params)) in rows.iter().zip(sequences).enumerate() {
            assert!(Arc::ptr_eq(&sample.params, params), "parameters of row {index}");
            assert_eq!((sample.row, sample.position), (index as u32, 7));
        }
        rows
    }

    #[test]
    fn rows_are_those_of_their_sequences_whoever_came_and_went() {
        let [a, b, c, d, e] = std::array::from_fn(|_| Arc::new(SamplingParams::default()));
        let mut rows = Vec::new();
        for sequences in [
            &[&a, &b, &c, &d][..],
            &[&a, &b, &c, &d],
            &[&a, &c, &d],
            &[&a, &d, &e],
            &[&b, &a, &d, &e, &c],
            &[&e, &c],
            &[&c, &c, &e],
            &[],
            &[&a],
        ] {
            rows = write(rows, sequences);
        }
        drop(rows);
        for params in [a, b, c, d, e] {
            assert_eq!(Arc::strong_count(&params), 1, "no row is left");
        }
    }
}
