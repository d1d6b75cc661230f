//! From options to a GPU that computes beside the CPU.

use super::folders::cache_folder;
use super::options::{GpuMemory, GpuOptions};
use super::report::note;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::moe::Model;
use crate::moe::offload::{Device, Plan};
#[cfg(feature = "cuda")]
use {
    crate::moe::Config, crate::moe::offload::forecast::Needs, crate::moe::weights::Weights,
    crate::readable::bytes,
};

/// What is left to others of a GPU's memory when nobody says how much to take.
const RESERVE: u64 = 512 << 20;

/// Has a GPU compute with the experts of `model` that it has memory for, as the options say. Where there is none and one was
/// asked for, a line says why, and the CPU does everything. `shares`, `context`: as in [`Plan`].
///
/// # Errors
/// [`Error::Usage`] if a GPU is asked for that this program was not built for.
pub(super) fn offload(
    model: &mut Model,
    options: &GpuOptions,
    shares: Option<Vec<f32>>,
    context: Option<usize>,
    verbose: bool,
) -> Result<()> {
    let asked = options.gpu_mem.is_some() || options.gpu.is_some();
    let memory = options.gpu_mem.unwrap_or(GpuMemory::Auto);
    if memory == GpuMemory::Bytes(0) || !model.config.routed {
        return Ok(());
    }
    if !cfg!(feature = "cuda") {
        return match asked {
            true => Err(built_without()),
            false => Ok(()),
        };
    }
    let opened = open(options.gpu.unwrap_or(0).into()).and_then(|mut device| {
        let free = device.free();
        let free = free.map_err(|e| format!("it was lost at once: {e:?}"))?;
        Ok((device, free))
    });
    let (device, free) = match opened {
        Ok(opened) => opened,
        Err(why) => {
            if asked || verbose {
                note(format!("no GPU, the CPU computes everything: {why}"));
            }
            return Ok(());
        }
    };
    let bytes = match memory {
        GpuMemory::Auto => free.saturating_sub(RESERVE),
        GpuMemory::Bytes(bytes) => bytes,
    };
    if asked || verbose {
        note(format!(
            "{}: the experts that are chosen most go there, up to {:.1} GB of {:.1} GB that are free",
            device.name(),
            bytes.min(free) as f64 / 1e9,
            free as f64 / 1e9,
        ));
    }
    model.offload_to(Plan {
        device,
        memory: bytes,
        shares,
        context,
        tell: Box::new(note),
    });
    Ok(())
}

/// What this program was not built for.
fn built_without() -> Error {
    Error::Usage(
        "--gpu-mem, --gpu: this octet was built without CUDA (expected --gpu-mem 0); \
         cargo build --release --features cuda makes one that uses a GPU"
            .to_string(),
    )
}

/// Bytes of a GPU that would be used, as the options say: so many as they name, with or without a GPU, or what is free of
/// the one that is there. Nothing, if there is none, or none is to be used.
///
/// # Errors
/// [`Error::Usage`] if a GPU is asked for that this program was not built for.
pub(super) fn memory_to_plan(options: &GpuOptions) -> Result<Option<u64>> {
    match options.gpu_mem {
        Some(GpuMemory::Bytes(0)) => Ok(None),
        _ if cfg!(feature = "cuda") => Ok(match options.gpu_mem {
            Some(GpuMemory::Bytes(bytes)) => Some(bytes),
            _ => {
                let free = open(options.gpu.unwrap_or(0).into())
                    .and_then(|mut device| device.free().map_err(|e| format!("{e:?}")));
                let asked = options.gpu_mem.is_some() || options.gpu.is_some();
                if let (Err(why), true) = (&free, asked) {
                    note(format!("no GPU: {why}; --gpu-mem 8G plans with one"));
                }
                free.ok().map(|free| free.saturating_sub(RESERVE))
            }
        }),
        None if options.gpu.is_none() => Ok(None),
        _ => Err(built_without()),
    }
}

/// What of a file a GPU could have, each with a name: whether there is one or not. Nothing for other files than those of a mixture
/// of experts, and in a program that was not built for a GPU.
pub(super) fn inspected(file: &Gguf) -> Vec<(&'static str, String)> {
    #[cfg(feature = "cuda")]
    {
        use crate::moe::offload::forecast::needs;
        let config = Config::read(file).ok().filter(|c| c.routed);
        let read = config.and_then(|c| Some((Weights::load(file, &c).ok()?, c)));
        read.map_or(Vec::new(), |(weights, c)| told(&needs(&c, &weights)))
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = file;
        Vec::new()
    }
}

/// The same as lines.
#[cfg(feature = "cuda")]
fn told(needs: &Needs) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("computes with", bytes(needs.scratch)),
        ("every token reads", bytes(needs.dense)),
    ];
    let mut left = Vec::new();
    match needs.kv_token {
        Some(token) => {
            let tokens = (1 << 30) / token.max(1);
            let text = format!("{} a token: {tokens} tokens in each GiB", bytes(token));
            lines.push(("keys and values", text));
        }
        None => left.push("keys and values".to_string()),
    }
    let (n, of) = (needs.experts, needs.of);
    if n > 0 {
        let each = needs.bytes / n as u64;
        let many = (1 << 30) as f64 / each as f64;
        let text = format!(
            "{n} of {of}, {} on average: {many:.1} in each GiB, {} for all",
            bytes(each),
            bytes(needs.bytes)
        );
        lines.push(("experts", text));
    }
    if n < of {
        left.push(format!("{} of {of} experts", of - n));
    }
    if !left.is_empty() {
        let names: Vec<_> = needs.without.iter().map(|f| f.name()).collect();
        let why = match names.is_empty() {
            // Gate and up of two formats, or the experts of a layer.
            true => "matrices that work together have different formats".to_string(),
            false => format!("there are no kernels for {}", names.join(", ")),
        };
        let text = format!("{}; {why}", left.join(", "));
        lines.push(("stays with the CPU", text));
    }
    lines
}

#[cfg(feature = "cuda")]
fn open(ordinal: usize) -> std::result::Result<Box<dyn Device>, String> {
    crate::moe::offload::cuda::open(ordinal, cache_folder().as_deref())
}

#[cfg(not(feature = "cuda"))]
fn open(_: usize) -> std::result::Result<Box<dyn Device>, String> {
    let _ = cache_folder;
    Err("this octet was built without CUDA".to_string())
}
