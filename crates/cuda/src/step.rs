//! A step's inputs on their way to the device (`kernels/step.cu`): one packed buffer, one copy, and one kernel that puts
//! everything where the other kernels look for it.

use lapidary_engine::{Batch, TokenId};
use lapidary_model::{BackendError, StepLimits};

use crate::device::{Device, DevicePtr, Grid, Kernel, bytes_of, kernel_params, launch};

/// Words before the sections.
const HEADER: usize = 8;
const SECTIONS: usize = 9;
/// The kernels move 4 words at a time.
const WORD_MULTIPLE: usize = 4;
const THREADS: usize = 256;
/// Enough for the longest block tables, and not many for a step that one of them could copy.
const BLOCKS: usize = 16;
/// Bytes of the kernels' `StepCounts`.
const COUNTS_BYTES: usize = 16;

/// The kernels' `Step` (`kernels/common/step.cuh`).
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct StepPointers {
    pub(crate) counts: DevicePtr,
    pub(crate) token_ids: DevicePtr,
    pub(crate) positions: DevicePtr,
    pub(crate) slots: DevicePtr,
    pub(crate) query_start: DevicePtr,
    pub(crate) context_lens: DevicePtr,
    pub(crate) block_start: DevicePtr,
    pub(crate) block_ids: DevicePtr,
    pub(crate) sample_rows: DevicePtr,
    pub(crate) seq_of_token: DevicePtr,
}

impl StepPointers {
    /// Where kernels over tokens read how many there are.
    pub(crate) fn num_tokens(&self) -> DevicePtr {
        self.counts
    }

    /// Where kernels over sampled rows read how many there are.
    pub(crate) fn num_samples(&self) -> DevicePtr {
        self.counts.offset(8)
    }
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct BeginParams {
    packed: DevicePtr,
    counts: DevicePtr,
    sampled_tokens: DevicePtr,
    sections: [DevicePtr; SECTIONS],
    max_samples: i32,
    padding: i32,
}

kernel_params!(BeginParams);

/// The step's buffers on the device, made once for the largest step.
#[derive(Debug)]
pub(crate) struct StepBuffers {
    kernel: Kernel,
    params: BeginParams,
    pointers: StepPointers,
    packed: Vec<i32>,
    /// Of the largest step.
    max_lengths: [usize; SECTIONS],
    max_samples: usize,
    /// Of the step finished last: which half of the sampled tokens it wrote.
    parity: usize,
}

impl StepBuffers {
    /// Reserves room for steps within `limits` whose block tables have `max_blocks` entries in all and that sample
    /// `max_samples` rows.
    ///
    /// # Errors
    /// Not enough memory.
    pub(crate) fn alloc(
        device: &mut dyn Device,
        limits: StepLimits,
        max_blocks: usize,
        max_samples: usize,
    ) -> Result<Self, BackendError> {
        let (tokens, seqs) = (limits.max_tokens, limits.max_seqs);
        let lengths = section_lengths(tokens, seqs, max_blocks, max_samples);
        let capacity = HEADER + lengths.iter().map(|len| padded(*len)).sum::<usize>();
        let mut alloc = |words: usize| device.alloc("a step's inputs", 4 * padded(words));
        let mut sections = [DevicePtr::NULL; SECTIONS];
        for (section, len) in sections.iter_mut().zip(lengths) {
            *section = alloc(len)?;
        }
        let params = BeginParams {
            packed: alloc(capacity)?,
            counts: alloc(COUNTS_BYTES / 4)?,
            sampled_tokens: alloc(2 * max_samples)?,
            sections,
            max_samples: max_samples as i32,
            padding: 0,
        };
        device.zero(params.sampled_tokens, 8 * max_samples)?;
        let [
            token_ids,
            positions,
            slots,
            seq_of_token,
            query_start,
            context_lens,
            block_start,
            block_ids,
            sample_rows,
        ] = sections;
        Ok(Self {
            kernel: device.kernel("step_begin", THREADS as u32)?,
            params,
            pointers: StepPointers {
                counts: params.counts,
                token_ids,
                positions,
                slots,
                query_start,
                context_lens,
                block_start,
                block_ids,
                sample_rows,
                seq_of_token,
            },
            packed: Vec::with_capacity(capacity),
            max_lengths: lengths,
            max_samples,
            parity: 0,
        })
    }

    /// For the parameters of kernels.
    pub(crate) fn pointers(&self) -> &StepPointers {
        &self.pointers
    }

    /// `[2][max_samples]` tokens chosen by the steps of either parity.
    pub(crate) fn sampled_tokens(&self) -> DevicePtr {
        self.params.sampled_tokens
    }

    /// Tokens that a half of them has room for.
    pub(crate) fn max_samples(&self) -> usize {
        self.max_samples
    }

    /// Where the step begun last writes the tokens it chooses.
    pub(crate) fn current_tokens(&self) -> DevicePtr {
        self.sampled_tokens().offset(4 * self.parity * self.max_samples)
    }

    /// Uploads a step; [`StepBuffers::begin`] puts it in place. It takes the tokens it is fed from the step begun before,
    /// and the next one takes them from it.
    ///
    /// # Errors
    /// A batch beyond the limits, or the device failed.
    pub(crate) fn upload(&mut self, device: &mut dyn Device, batch: &Batch) -> Result<(), BackendError> {
        let counts = [
            batch.num_tokens(),
            batch.num_seqs(),
            batch.block_ids.len(),
            batch.samples.len(),
        ];
        let [tokens, seqs, blocks, samples] = counts;
        let lengths = section_lengths(tokens, seqs, blocks, samples);
        if lengths.iter().zip(&self.max_lengths).any(|(len, max)| len > max) {
            let what = format!("a step of {tokens} tokens, {seqs} sequences, {blocks} blocks and {samples} samples");
            return Err(BackendError::Unsupported(what));
        }
        pack(batch, 1 - self.parity, &mut self.packed);
        device.upload(self.params.packed, bytes_of(&self.packed))
    }

    /// Launches what puts the uploaded step in place; the launch is the same for every step.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn begin(&self, device: &mut dyn Device) -> Result<(), BackendError> {
        launch(device, &self.kernel, Grid::line(BLOCKS), &self.params)
    }

    /// The step begun has chosen its tokens: the next one is fed from it. One that failed before is as if it had not been.
    pub(crate) fn finish(&mut self) {
        self.parity = 1 - self.parity;
    }

    /// A whole step that only puts its inputs in place.
    #[cfg(all(test, feature = "emulator"))]
    pub(crate) fn run(&mut self, device: &mut dyn Device, batch: &Batch) -> Result<(), BackendError> {
        self.upload(device, batch)?;
        self.begin(device)?;
        self.finish();
        Ok(())
    }
}

/// In the order of the packed step.
fn section_lengths(tokens: usize, seqs: usize, blocks: usize, samples: usize) -> [usize; SECTIONS] {
    [
        tokens,
        tokens,
        tokens,
        tokens,
        seqs + 1,
        seqs,
        seqs + 1,
        blocks,
        samples,
    ]
}

fn padded(words: usize) -> usize {
    words.next_multiple_of(WORD_MULTIPLE)
}

/// The packed step, as the kernel's file describes it.
fn pack(batch: &Batch, parity: usize, words: &mut Vec<i32>) {
    words.clear();
    let counts = [
        batch.num_tokens(),
        batch.num_seqs(),
        batch.samples.len(),
        parity,
        batch.block_ids.len(),
    ];
    words.extend(counts.map(|count| count as i32));
    words.resize(HEADER, 0);
    section(words, batch.token_ids.iter().map(|token| TokenId::cast_signed(*token)));
    for fed in &batch.fed {
        words[HEADER + fed.row as usize] = -1 - fed.prev_sample as i32;
    }
    section(words, signed(&batch.positions));
    section(words, signed(&batch.slot_mapping));
    let rows = batch.query_start.windows(2).map(|ends| ends[1] - ends[0]).enumerate();
    section(
        words,
        rows.flat_map(|(seq, rows)| std::iter::repeat_n(seq as i32, rows as usize)),
    );
    section(words, signed(&batch.query_start));
    section(words, signed(&batch.context_lens));
    section(words, signed(&batch.block_start));
    section(words, batch.block_ids.iter().map(|block| block.0.cast_signed()));
    section(words, batch.samples.iter().map(|sample| sample.row.cast_signed()));
}

fn signed(values: &[u32]) -> impl Iterator<Item = i32> + '_ {
    values.iter().map(|value| value.cast_signed())
}

fn section(words: &mut Vec<i32>, values: impl Iterator<Item = i32>) {
    words.extend(values);
    words.resize(padded(words.len()), 0);
}

#[cfg(all(test, feature = "emulator"))]
pub(crate) mod tests {
    use std::sync::Arc;

    use lapidary_engine::{BlockId, FedToken, RequestId, SampleRow, SamplingParams};

    use super::*;
    use crate::device::read_back;
    use crate::testing::device;

    /// A step of one sequence whose tokens are `token_ids`.
    pub(crate) fn sequence(token_ids: &[TokenId]) -> Batch {
        let tokens = token_ids.len() as u32;
        Batch {
            request_ids: vec![RequestId(0)],
            token_ids: token_ids.to_vec(),
            positions: (0..tokens).collect(),
            slot_mapping: (0..tokens).collect(),
            query_start: vec![0, tokens],
            context_lens: vec![tokens],
            block_start: vec![0, 1],
            block_ids: vec![BlockId(0)],
            ..Batch::default()
        }
    }

    pub(crate) fn buffers(device: &mut dyn Device, max_tokens: usize) -> StepBuffers {
        let limits = StepLimits {
            max_tokens,
            max_seqs: max_tokens,
            max_model_len: 64,
        };
        StepBuffers::alloc(device, limits, 4 * max_tokens, max_tokens).expect("steps are small")
    }

    fn sample(row: u32) -> SampleRow {
        SampleRow {
            row,
            position: 0,
            given: None,
            params: Arc::new(SamplingParams::default()),
            banned: None,
            mask: None,
            history: None,
        }
    }

    /// `lens[i]` tokens of sequence `i`, all numbers different.
    fn batch(lens: &[u32]) -> Batch {
        let mut batch = Batch {
            query_start: vec![0],
            block_start: vec![0],
            ..Batch::default()
        };
        for (seq, len) in lens.iter().enumerate() {
            let seq = seq as u32;
            batch.request_ids.push(RequestId(u64::from(seq)));
            batch.token_ids.extend((0..*len).map(|i| 1000 * (seq + 1) + i));
            batch.positions.extend((0..*len).map(|i| 100 * seq + i));
            batch.slot_mapping.extend((0..*len).map(|i| 7000 + 50 * seq + i));
            batch.query_start.push(batch.token_ids.len() as u32);
            batch.context_lens.push(100 * seq + len);
            batch.block_ids.extend((0..=seq % 3).map(|i| BlockId(10 * seq + i)));
            batch.block_start.push(batch.block_ids.len() as u32);
            batch.samples.push(sample(batch.token_ids.len() as u32 - 1));
        }
        batch
    }

    fn check(device: &mut dyn Device, step: &StepBuffers, batch: &Batch, token_ids: &[u32]) {
        let StepPointers {
            counts,
            positions,
            slots,
            query_start,
            context_lens,
            block_start,
            block_ids,
            sample_rows,
            seq_of_token,
            ..
        } = *step.pointers();
        let (tokens, seqs) = (batch.num_tokens(), batch.num_seqs());
        let read = |device: &mut dyn Device, from, count| read_back::<u32>(device, from, count);
        let wanted = [tokens, seqs, batch.samples.len(), step.parity].map(|count| count as u32);
        assert_eq!(read(device, counts, 4), wanted);
        assert_eq!(read(device, step.pointers().token_ids, tokens), token_ids);
        assert_eq!(read(device, positions, tokens), batch.positions);
        assert_eq!(read(device, slots, tokens), batch.slot_mapping);
        assert_eq!(read(device, query_start, seqs + 1), batch.query_start);
        assert_eq!(read(device, context_lens, seqs), batch.context_lens);
        assert_eq!(read(device, block_start, seqs + 1), batch.block_start);
        let blocks: Vec<_> = batch.block_ids.iter().map(|block| block.0).collect();
        assert_eq!(read(device, block_ids, blocks.len()), blocks);
        let rows: Vec<_> = batch.samples.iter().map(|sample| sample.row).collect();
        assert_eq!(read(device, sample_rows, rows.len()), rows);
        for (row, seq) in read(device, seq_of_token, tokens).into_iter().enumerate() {
            let owned = batch.query_start[seq as usize]..batch.query_start[seq as usize + 1];
            assert!(owned.contains(&(row as u32)), "row {row} of sequence {seq}");
        }
    }

    #[test]
    fn steps_of_any_shape_arrive_whole() {
        let mut device = device();
        let mut step = buffers(&mut *device, 700);
        let many: Vec<u32> = (0..120).map(|i| 1 + i % 9).collect();
        for lens in [&[1][..], &[17], &[1, 1, 1, 1], &[3, 129, 1, 4], &many] {
            let batch = batch(lens);
            step.run(&mut *device, &batch).expect("the step is within its limits");
            check(&mut *device, &step, &batch, &batch.token_ids);
        }
    }

    #[test]
    fn fed_rows_take_the_tokens_of_the_step_before() {
        let mut device = device();
        let mut step = buffers(&mut *device, 16);
        let first = batch(&[2, 3, 1]);
        step.run(&mut *device, &first).expect("the step is small");
        device
            .upload(step.current_tokens(), bytes_of(&[11_u32, 22, 33]))
            .expect("uploads work");
        let mut second = batch(&[1, 4, 1]);
        second.fed = vec![FedToken { row: 0, prev_sample: 2 }, FedToken { row: 5, prev_sample: 0 }];
        step.run(&mut *device, &second).expect("the step is small");
        let mut want = second.token_ids.clone();
        (want[0], want[5]) = (33, 11);
        check(&mut *device, &step, &second, &want);
        device
            .upload(step.current_tokens(), bytes_of(&[44_u32, 55, 66]))
            .expect("uploads work");
        second.fed = vec![FedToken { row: 1, prev_sample: 1 }];
        step.run(&mut *device, &second).expect("the step is small");
        want.clone_from(&second.token_ids);
        want[1] = 55;
        check(&mut *device, &step, &second, &want);
    }

    #[test]
    fn a_step_beyond_the_limits_is_refused() {
        let mut device = device();
        let mut step = buffers(&mut *device, 4);
        assert!(step.run(&mut *device, &batch(&[1; 40])).is_err());
    }
}
