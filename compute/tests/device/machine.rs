//! The devices that the bodies of the tests run on.

use crate::random::{poison, wide};
use compute::cuda::{self, Cuda, DeviceName};
use compute::{Cpu, Device, Dtype, cpu};
use std::sync::{Arc, OnceLock};

/// A device, and what a test needs of it besides its operations.
pub trait Machine: Device {
    fn start() -> Arc<Self>;
    /// A weight in memory of its own with these values, which `dtype` holds exactly.
    fn weight(self: &Arc<Self>, dtype: Dtype, rows: usize, cols: usize, values: &[f32]) -> Self::Weight;
    /// Activations as a product with a weight of `dtype` sees them.
    fn seen(dtype: Dtype, x: &[f32]) -> Vec<f64>;

    fn upload(&self, x: &[f32]) -> Self::Buffer {
        let mut buffer = self.uninit(x.len());
        self.write(&mut buffer, 0, x);
        buffer
    }
    /// What an output holds before a call that claims to set it.
    fn poisoned(&self, n: usize) -> Self::Buffer {
        self.upload(&poison(n))
    }
    fn download(&self, x: &Self::Buffer) -> Vec<f32> {
        let mut values = vec![0.0; self.len(x)];
        self.read(x, 0, &mut values);
        values
    }
    fn download_stored(&self, x: &Self::Stored) -> Vec<f32> {
        let mut values = vec![0.0; self.stored_len(x)];
        self.read_stored(x, 0, &mut values);
        values
    }
}

impl Machine for Cpu {
    fn start() -> Arc<Cpu> {
        Arc::new(Cpu::new(2).expect("two threads"))
    }
    fn weight(self: &Arc<Self>, dtype: Dtype, rows: usize, cols: usize, values: &[f32]) -> cpu::Weight {
        cpu::Weight::from_values(dtype, rows, cols, values)
    }
    fn seen(_: Dtype, x: &[f32]) -> Vec<f64> {
        wide(x)
    }
}

/// The CUDA backend on the simulated driver, which runs the kernels' own sources on the CPU.
impl Machine for Cuda {
    fn start() -> Arc<Cuda> {
        // One stays open, so that a GPU's context is not made anew for each test.
        static FIRST: OnceLock<Arc<Cuda>> = OnceLock::new();
        let open = || Arc::new(Cuda::open(&DeviceName::Ordinal(0)).expect("a device"));
        simulated_driver::load();
        FIRST.get_or_init(open);
        open()
    }
    fn weight(self: &Arc<Self>, dtype: Dtype, rows: usize, cols: usize, values: &[f32]) -> cuda::Weight {
        let plain = cpu::Weight::from_values(dtype, rows, cols, values);
        let mut bytes = vec![0; plain.bytes()];
        plain.read_bytes(0, &mut bytes);
        let w = cuda::Weight::zeros(self, dtype, rows, cols);
        self.write_weight(&w, 0, &bytes);
        w
    }
    /// The tensor cores take bf16, and two of them make a value.
    fn seen(dtype: Dtype, x: &[f32]) -> Vec<f64> {
        let split = |v: f32| {
            let high = half::bf16::from_f32(v);
            high.to_f64() + half::bf16::from_f32(v - high.to_f32()).to_f64()
        };
        match dtype {
            Dtype::BF16 => x.iter().map(|&v| split(v)).collect(),
            _ => wide(x),
        }
    }
}

/// Makes a test of each body, for every device.
macro_rules! on_every_device {
    ($($body:ident),* $(,)?) => {
        mod on_cpu {
            $(
                #[test]
                fn $body() {
                    super::$body(&<compute::Cpu as crate::machine::Machine>::start());
                }
            )*
        }
        /// As on a processor with dot products of bf16.
        mod on_cpu_in_pairs {
            $(
                #[test]
                fn $body() {
                    let cpu = compute::Cpu::new(2).expect("two threads").with_portable_pairs();
                    super::$body(&std::sync::Arc::new(cpu));
                }
            )*
        }
        mod on_cuda {
            $(
                #[test]
                fn $body() {
                    super::$body(&<compute::Cuda as crate::machine::Machine>::start());
                }
            )*
        }
    };
}
pub(crate) use on_every_device;
