//! Launches `kernels/rope.cu`, with the table it rotates by.

use lapidary_model::{AttentionConfig, BackendError, KvCacheDtype};

use crate::device::{Device, DevicePtr, Grid, Kernel, bytes_of, kernel_params, launch};
use crate::step::StepPointers;
use crate::tensor::{KvLayer, Tensor};

const THREADS: usize = 128;
/// Pairs that a thread rotates.
const PAIRS: usize = 8;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RopeParams {
    step: StepPointers,
    qkv: DevicePtr,
    table: DevicePtr,
    kv: DevicePtr,
    num_heads: i32,
    num_kv_heads: i32,
    head_dim: i32,
    block_size: i32,
    kv_is_e4m3: i32,
    key_scale: f32,
    value_scale: f32,
    padding: i32,
}

kernel_params!(RopeParams);

/// The kernel, and cosines and sines of every position.
#[derive(Debug)]
pub(crate) struct Rope {
    kernel: Kernel,
    table: DevicePtr,
    attention: AttentionConfig,
}

impl Rope {
    /// Makes the table for positions below `num_positions`.
    ///
    /// # Errors
    /// Not enough memory, or the device failed.
    pub(crate) fn load(
        device: &mut dyn Device,
        attention: &AttentionConfig,
        num_positions: usize,
    ) -> Result<Self, BackendError> {
        let values = table(attention, num_positions);
        let table = device.alloc("the rotary table", 4 * values.len())?;
        device.upload(table, bytes_of(&values))?;
        Ok(Self {
            kernel: device.kernel("rope_append", THREADS as u32)?,
            table,
            attention: *attention,
        })
    }

    /// Rotates the queries of at most `tokens` rows of `qkv` in place, and writes rotated keys and values to their slots.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn append(
        &self,
        device: &mut dyn Device,
        step: &StepPointers,
        tokens: usize,
        qkv: &Tensor,
        kv: &KvLayer,
    ) -> Result<(), BackendError> {
        let AttentionConfig {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = self.attention;
        let params = RopeParams {
            step: *step,
            qkv: qkv.data,
            table: self.table,
            kv: kv.data,
            num_heads: num_heads as i32,
            num_kv_heads: num_kv_heads as i32,
            head_dim: head_dim as i32,
            block_size: kv.block_size as i32,
            kv_is_e4m3: i32::from(self.attention.kv_cache_dtype == KvCacheDtype::Fp8E4m3),
            key_scale: kv.scales.key,
            value_scale: kv.scales.value,
            padding: 0,
        };
        let threads = (num_heads + 2 * num_kv_heads) * (head_dim / 2).div_ceil(PAIRS);
        // The kernel reads rows before it knows how many are asked for.
        let tokens = tokens.min(qkv.rows);
        let grid = Grid {
            blocks: [tokens as u32, threads.div_ceil(THREADS) as u32, 1],
            shared_bytes: 0,
        };
        launch(device, &self.kernel, grid, &params)
    }
}

/// `[num_positions][2: cos, sin][head_dim / 2]`. Angles are rounded to f32 as transformers does it, which is part of what
/// models were trained with.
fn table(attention: &AttentionConfig, num_positions: usize) -> Vec<f32> {
    let frequency = |i: usize| {
        let exponent = (2 * i) as f32 / attention.head_dim as f32;
        1.0 / attention.rope_theta.powf(exponent)
    };
    let frequencies: Vec<f32> = (0..attention.head_dim / 2).map(frequency).collect();
    let mut table = Vec::with_capacity(num_positions * attention.head_dim);
    for position in 0..num_positions {
        let angle = |frequency: &f32| f64::from(position as f32 * frequency);
        table.extend(frequencies.iter().map(|frequency| angle(frequency).cos() as f32));
        table.extend(frequencies.iter().map(|frequency| angle(frequency).sin() as f32));
    }
    table
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use half::bf16;

    use lapidary_model::KvScales;

    use super::*;
    use crate::device::read_back;
    use crate::pack::e4m3_to_f32;
    use crate::step::tests::{buffers, sequence};
    use crate::testing::{Numbers, device};

    const BLOCK_SIZE: usize = 16;
    const BLOCKS: usize = 4;
    const TOKENS: usize = 5;
    /// Of a value of 2.9, by an angle of 8191 that was rounded to f32.
    const ANGLE_ERROR: f64 = 8191.0 * 2.4e-7 * 2.9;
    /// A byte of the cache before.
    const UNTOUCHED: u8 = 0xc3;
    /// With which some values are clipped; nobody looks at them where the cache is not e4m3.
    const SCALES: KvScales = KvScales {
        key: 0.0061,
        value: 0.0037,
    };

    fn check(num_heads: usize, num_kv_heads: usize, head_dim: usize, dtype: KvCacheDtype) {
        let mut device = device();
        let attention = AttentionConfig {
            num_heads,
            num_kv_heads,
            head_dim,
            scale: 1.0,
            softcap: None,
            rope_theta: 1e4,
            kv_cache_dtype: dtype,
        };
        let rope = Rope::load(&mut *device, &attention, 8192).expect("the table is small");
        let mut step = buffers(&mut *device, TOKENS + 1);
        let mut batch = sequence(&[0; TOKENS]);
        batch.positions = vec![0, 1, 17, 4095, 8191];
        batch.slot_mapping = vec![63, 0, 16, 31, 5];
        step.run(&mut *device, &batch).expect("the step is small");

        let heads = num_heads + 2 * num_kv_heads;
        let cols = heads * head_dim;
        // One row more than the step has.
        let values = Numbers::new(3).bf16_values((TOKENS + 1) * cols, 2.0);
        let narrow: Vec<_> = values.iter().map(|x| bf16::from_f32(*x)).collect();
        let qkv = Tensor::alloc(&mut *device, "test data", [TOKENS + 1, cols], false).expect("tensors are small");
        device.upload(qkv.data, bytes_of(&narrow)).expect("uploads work");
        let elements = BLOCKS * 2 * num_kv_heads * BLOCK_SIZE * head_dim;
        let is_e4m3 = dtype == KvCacheDtype::Fp8E4m3;
        let bytes = elements * crate::attention::value_bytes(&attention);
        let data = device.alloc("test data", bytes).expect("caches are small");
        let untouched = vec![UNTOUCHED; bytes];
        device.upload(data, bytes_of(&untouched)).expect("uploads work");
        let kv = KvLayer {
            data,
            block_size: BLOCK_SIZE,
            scales: SCALES,
        };
        rope.append(&mut *device, step.pointers(), TOKENS + 1, &qkv, &kv)
            .expect("rope runs");

        let mut want_cache = vec![None; elements];
        let mut want_qkv: Vec<f64> = values.iter().copied().map(f64::from).collect();
        for row in 0..TOKENS {
            for head in 0..heads {
                let from = (row * heads + head) * head_dim;
                let mut values = want_qkv[from..from + head_dim].to_vec();
                let kv_head = head.checked_sub(num_heads);
                if kv_head.is_none_or(|head| head < num_kv_heads) {
                    rotate(&mut values, batch.positions[row]);
                }
                let Some(kv_head) = kv_head else {
                    want_qkv[from..from + head_dim].copy_from_slice(&values);
                    continue;
                };
                let slot = batch.slot_mapping[row] as usize;
                let line = slot / BLOCK_SIZE * 2 * num_kv_heads + kv_head;
                let row = slot % BLOCK_SIZE;
                let to = (line * BLOCK_SIZE + row) * head_dim;
                let turn = chunk_turn(head_dim, row, is_e4m3);
                for (dim, value) in values.iter().enumerate() {
                    let is_key = line % (2 * num_kv_heads) < num_kv_heads;
                    want_cache[to + (dim ^ turn)] = Some((*value, is_key));
                }
            }
        }
        let got: Vec<bf16> = read_back(&mut *device, qkv.data, want_qkv.len());
        assert_close("qkv", &got, &want_qkv);
        let got: Vec<u8> = read_back(&mut *device, kv.data, bytes);
        for (index, (got, want)) in got.chunks(bytes / elements).zip(want_cache).enumerate() {
            match want {
                None => assert!(got.iter().all(|byte| *byte == UNTOUCHED), "cache: element {index}"),
                Some((want, is_key)) if is_e4m3 => assert_code(index, got[0], want, is_key),
                Some((want, _)) => assert_close("cache", &[bf16::from_le_bytes([got[0], got[1]])], &[want]),
            }
        }
    }

    /// What the place of an element in its row is turned by, if chunks of 16 bytes are permuted.
    fn chunk_turn(head_dim: usize, row: usize, is_e4m3: bool) -> usize {
        match (head_dim.is_multiple_of(64), is_e4m3) {
            (false, _) => 0,
            (true, false) => row % 8 * 8,
            (true, true) if head_dim == 64 => row / 2 % 4 * 16,
            (true, true) => row % 8 * 16,
        }
    }

    /// The nearest of all codes, but for what a key's angle errs.
    fn assert_code(index: usize, got: u8, want: f64, is_key: bool) {
        let (scale, error) = if is_key {
            (SCALES.key, ANGLE_ERROR)
        } else {
            (SCALES.value, 1e-7)
        };
        let distance = |code: u8| (f64::from(e4m3_to_f32(code)) * f64::from(scale) - want).abs();
        let codes = (0..=u8::MAX).filter(|code| code & 0x7f != 0x7f);
        let nearest = codes.map(distance).fold(f64::MAX, f64::min);
        assert!(
            got & 0x7f != 0x7f && distance(got) <= nearest + 2.0 * error,
            "cache: element {index} is code {got:#x}, expected {want} by {scale}"
        );
    }

    fn rotate(head: &mut [f64], position: u32) {
        let half = head.len() / 2;
        for i in 0..half {
            let frequency = 1e4_f64.powf(-((2 * i) as f64) / head.len() as f64);
            let (sin, cos) = (f64::from(position) * frequency).sin_cos();
            let (a, b) = (head[i], head[i + half]);
            (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }

    fn assert_close(what: &str, got: &[bf16], want: &[f64]) {
        for (index, (got, want)) in got.iter().zip(want).enumerate() {
            let got = f64::from(got.to_f32());
            // A stored bf16.
            let allowed = want.abs() / 256.0 + ANGLE_ERROR;
            assert!(
                (got - want).abs() <= allowed,
                "{what}: element {index} is {got}, expected {want}"
            );
        }
    }

    #[test]
    fn heads_turn_and_reach_their_slots() {
        for (num_heads, num_kv_heads, head_dim) in [
            (1, 1, 2),
            (2, 1, 30),
            (4, 2, 32),
            (3, 3, 34),
            (2, 1, 64),
            (8, 4, 256),
            (8, 1, 128),
        ] {
            for dtype in [KvCacheDtype::Native, KvCacheDtype::Fp8E4m3] {
                check(num_heads, num_kv_heads, head_dim, dtype);
            }
        }
    }
}
