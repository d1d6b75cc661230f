//! Small models: files of random weights and a vocabulary of 300 pieces, which can be changed before they are written. What is
//! right is said by [`Small::logits`], the definition of the model in f64, one token at a time.

use std::rc::Rc;

use octet::gguf::Writer;
use octet::gguf::writer::Put;
use octet::quant::Format;
use octet::quant::search::Plain;

/// How a file holds its experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One tensor for all experts of a layer.
    Fused,
    /// One tensor for each expert.
    Single,
    /// No router, one feed-forward network.
    Dense,
}

/// The shape of a small model.
#[derive(Clone, Debug)]
pub(crate) struct Small {
    pub(crate) d_model: usize,
    pub(crate) n_layer: usize,
    pub(crate) n_head: usize,
    pub(crate) n_kv: usize,
    pub(crate) d_head: usize,
    pub(crate) d_ff: usize,
    pub(crate) n_expert: usize,
    pub(crate) n_used: usize,
    pub(crate) n_rot: usize,
    pub(crate) n_ctx: u32,
    pub(crate) format: Format,
    pub(crate) router: Format,
    pub(crate) layout: Layout,
    /// The embedding is the output head, too.
    pub(crate) tied: bool,
}

pub(crate) const N_VOCAB: usize = 300;
const EPS: f32 = 1e-5;
const ROPE_BASE: f32 = 10_000.0;

impl Default for Small {
    fn default() -> Small {
        Small {
            d_model: 64,
            n_layer: 2,
            n_head: 4,
            n_kv: 2,
            d_head: 16,
            d_ff: 96,
            n_expert: 4,
            n_used: 2,
            n_rot: 16,
            n_ctx: 64,
            format: Format::F32,
            router: Format::F32,
            layout: Layout::Fused,
            tied: false,
        }
    }
}

/// A tensor's name and shape, innermost dimension first, and what its weights are made from.
struct Entry {
    name: String,
    shape: Vec<usize>,
    format: Format,
    /// One name per matrix, so that both layouts of experts get the same weights.
    seeds: Vec<String>,
}

impl Small {
    fn entries(&self) -> Vec<Entry> {
        let (d, q, kv) = (
            self.d_model,
            self.n_head * self.d_head,
            self.n_kv * self.d_head,
        );
        let one = |name: &str, shape: &[usize], format: Format| Entry {
            name: format!("{name}.weight"),
            shape: shape.to_vec(),
            format,
            seeds: vec![name.to_string()],
        };
        let mut all = vec![one("token_embd", &[d, N_VOCAB], self.format)];
        for i in 0..self.n_layer {
            let mut layer = |name: &str, shape: &[usize], format| {
                all.push(one(&format!("blk.{i}.{name}"), shape, format));
            };
            layer("attn_norm", &[d], Format::F32);
            layer("attn_q", &[d, q], self.format);
            layer("attn_k", &[d, kv], self.format);
            layer("attn_v", &[d, kv], self.format);
            layer("attn_output", &[q, d], self.format);
            layer("ffn_norm", &[d], Format::F32);
            if self.layout != Layout::Dense {
                layer("ffn_gate_inp", &[d, self.n_expert], self.router);
            }
            for (part, n_in, n_out) in [
                ("gate", d, self.d_ff),
                ("up", d, self.d_ff),
                ("down", self.d_ff, d),
            ] {
                let single = |e: usize| format!("blk.{i}.ffn_{part}.{e}");
                match self.layout {
                    Layout::Dense => {
                        all.push(one(
                            &format!("blk.{i}.ffn_{part}"),
                            &[n_in, n_out],
                            self.format,
                        ));
                    }
                    Layout::Single => all.extend(
                        (0..self.n_expert).map(|e| one(&single(e), &[n_in, n_out], self.format)),
                    ),
                    Layout::Fused => all.push(Entry {
                        name: format!("blk.{i}.ffn_{part}_exps.weight"),
                        shape: vec![n_in, n_out, self.n_expert],
                        format: self.format,
                        seeds: (0..self.n_expert).map(single).collect(),
                    }),
                }
            }
        }
        all.push(one("output_norm", &[d], Format::F32));
        if !self.tied {
            all.push(one("output", &[d, N_VOCAB], self.format));
        }
        all
    }

    /// The model as a file.
    pub(crate) fn file(&self) -> File {
        let mut file = File::default();
        file.set("general.architecture", "llama")
            .set("llama.block_count", self.n_layer as u32)
            .set("llama.context_length", self.n_ctx)
            .set("llama.embedding_length", self.d_model as u32)
            .set("llama.feed_forward_length", self.d_ff as u32)
            .set("llama.attention.head_count", self.n_head as u32)
            .set("llama.attention.head_count_kv", self.n_kv as u32)
            .set("llama.attention.layer_norm_rms_epsilon", EPS)
            .set("llama.rope.freq_base", ROPE_BASE)
            .set("llama.rope.dimension_count", self.n_rot as u32);
        if self.d_head * self.n_head != self.d_model {
            file.set("llama.attention.key_length", self.d_head as u32)
                .set("llama.attention.value_length", self.d_head as u32);
        }
        if self.layout != Layout::Dense {
            file.set("llama.expert_count", self.n_expert as u32)
                .set("llama.expert_used_count", self.n_used as u32);
        }
        let (tokens, scores, kinds) = vocabulary();
        file.set("tokenizer.ggml.model", "llama")
            .set("tokenizer.ggml.tokens", tokens)
            .set("tokenizer.ggml.scores", scores)
            .set("tokenizer.ggml.token_type", kinds)
            .set("tokenizer.ggml.bos_token_id", 1u32)
            .set("tokenizer.ggml.eos_token_id", 2u32)
            .set("tokenizer.ggml.unknown_token_id", 0u32);
        for e in self.entries() {
            let weights: Vec<f32> = e
                .seeds
                .iter()
                .flat_map(|seed| weights(seed, &e.shape))
                .collect();
            let shape = e.shape.iter().map(|n| *n as u64).collect();
            file.tensors.push(Part {
                name: e.name,
                type_id: e.format as u32,
                bytes: encode(e.format, &weights, e.shape[0]),
                shape,
            });
        }
        file
    }

    /// The logits after each of `tokens`, by the definition of the model, in f64 with f32 weights.
    pub(crate) fn logits(&self, tokens: &[u32]) -> Vec<f64> {
        let (d, dh, group) = (self.d_model, self.d_head, self.n_head / self.n_kv);
        let matrix =
            |name: &str, n_in: usize, n_out: usize, x: &[f64]| product(name, n_in, n_out, x);
        let embed = weights("token_embd", &[d, N_VOCAB]);
        // Keys and values of each layer, one entry per position.
        let mut cache = vec![(Vec::new(), Vec::new()); self.n_layer];
        let mut all = Vec::new();
        for (pos, id) in tokens.iter().enumerate() {
            let row = &embed[*id as usize * d..][..d];
            let mut x: Vec<f64> = row.iter().map(|w| *w as f64).collect();
            for (i, (keys, values)) in cache.iter_mut().enumerate() {
                let h = norm(&format!("blk.{i}.attn_norm"), &x);
                let mut q = matrix(&format!("blk.{i}.attn_q"), d, self.n_head * dh, &h);
                let mut k = matrix(&format!("blk.{i}.attn_k"), d, self.n_kv * dh, &h);
                let v = matrix(&format!("blk.{i}.attn_v"), d, self.n_kv * dh, &h);
                for head in q.chunks_mut(dh).chain(k.chunks_mut(dh)) {
                    for (j, pair) in head[..self.n_rot].chunks_mut(2).enumerate() {
                        let angle = pos as f64
                            * (ROPE_BASE as f64).powf(-((2 * j) as f64) / self.n_rot as f64);
                        let (s, c) = angle.sin_cos();
                        (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c);
                    }
                }
                keys.push(k);
                values.push(v);
                let mut heads = vec![0.0; self.n_head * dh];
                for (n, (q, out)) in q.chunks(dh).zip(heads.chunks_mut(dh)).enumerate() {
                    let at = n / group * dh..(n / group + 1) * dh;
                    let mut shares: Vec<f64> = keys
                        .iter()
                        .map(|k: &Vec<f64>| dot(q, &k[at.clone()]) / (dh as f64).sqrt())
                        .collect();
                    softmax(&mut shares);
                    for (share, v) in shares.iter().zip(values.iter()) {
                        for (out, v) in out.iter_mut().zip(&v[at.clone()]) {
                            *out += share * v;
                        }
                    }
                }
                let o = matrix(&format!("blk.{i}.attn_output"), self.n_head * dh, d, &heads);
                x.iter_mut().zip(&o).for_each(|(x, o)| *x += o);

                let h = norm(&format!("blk.{i}.ffn_norm"), &x);
                for (suffix, share) in self.choices(i, &h) {
                    let gate = matrix(&format!("blk.{i}.ffn_gate{suffix}"), d, self.d_ff, &h);
                    let up = matrix(&format!("blk.{i}.ffn_up{suffix}"), d, self.d_ff, &h);
                    let inner: Vec<f64> = gate
                        .iter()
                        .zip(&up)
                        .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                        .collect();
                    let down = matrix(&format!("blk.{i}.ffn_down{suffix}"), self.d_ff, d, &inner);
                    x.iter_mut().zip(&down).for_each(|(x, y)| *x += share * y);
                }
            }
            let h = norm("output_norm", &x);
            let head = if self.tied { "token_embd" } else { "output" };
            all.extend(matrix(head, d, N_VOCAB, &h));
        }
        all
    }

    /// The experts of a token, as the end of their tensors' names, and their shares.
    fn choices(&self, layer: usize, h: &[f64]) -> Vec<(String, f64)> {
        if self.layout == Layout::Dense {
            return vec![(String::new(), 1.0)];
        }
        let router = format!("blk.{layer}.ffn_gate_inp");
        let mut shares = product(&router, self.d_model, self.n_expert, h);
        softmax(&mut shares);
        let mut order: Vec<usize> = (0..self.n_expert).collect();
        order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]));
        order.truncate(self.n_used);
        let sum: f64 = order.iter().map(|e| shares[*e]).sum();
        order
            .iter()
            .map(|e| (format!(".{e}"), shares[*e] / sum))
            .collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(x: &mut [f64]) {
    let max = x.iter().copied().fold(f64::MIN, f64::max);
    x.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f64 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}

/// RMSNorm with the weights of this name.
fn norm(name: &str, x: &[f64]) -> Vec<f64> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + EPS as f64).sqrt();
    let w = weights(name, &[x.len()]);
    x.iter()
        .zip(&w)
        .map(|(x, w)| x * scale * *w as f64)
        .collect()
}

/// The matrix of this name times `x`.
fn product(name: &str, n_in: usize, n_out: usize, x: &[f64]) -> Vec<f64> {
    assert_eq!(x.len(), n_in);
    weights(name, &[n_in, n_out])
        .chunks(n_in)
        .map(|row| row.iter().zip(x).map(|(w, x)| *w as f64 * x).sum())
        .collect()
}

/// The weights of this name: uniform random numbers, always the same, of variance 1 / n_in.
pub(crate) fn weights(name: &str, shape: &[usize]) -> Vec<f32> {
    // FNV-1a, then xorshift64* (Vigna 2016).
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
        (h ^ b as u64).wrapping_mul(0x100_0000_01b3)
    });
    let n: usize = shape.iter().take(2).product();
    let uniform = std::iter::repeat_with(|| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let bits = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40;
        bits as f32 / (1u32 << 23) as f32 - 1.0
    });
    let scale = (3.0 / shape[0] as f32).sqrt();
    let weight = |u: f32| match shape.len() {
        1 => 1.0 + 0.2 * u,
        _ => scale * u,
    };
    uniform.take(n).map(weight).collect()
}

/// Rows of `n_in` weights in a format.
pub(crate) fn encode(format: Format, weights: &[f32], n_in: usize) -> Vec<u8> {
    let row = format.row_bytes(n_in);
    let mut bytes = vec![0; weights.len() / n_in * row];
    for (w, out) in weights.chunks(n_in).zip(bytes.chunks_mut(row)) {
        format.encode::<Plain>(w, None, out);
    }
    bytes
}

/// Three special pieces, all bytes, and enough words for [`N_VOCAB`].
pub(crate) fn vocabulary() -> (Vec<String>, Vec<f32>, Vec<i32>) {
    let mut pieces = vec![
        ("<unk>".to_string(), 2),
        ("<s>".to_string(), 3),
        ("</s>".to_string(), 3),
    ];
    pieces.extend((0..256).map(|b| (format!("<0x{b:02X}>"), 6)));
    let words = ["\u{2581}", "\u{2581}the", "th", "\u{2581}fox", "ox"];
    pieces.extend(words.map(|w| (w.to_string(), 1)));
    pieces.extend(('a'..='z').chain('0'..='9').map(|c| (c.to_string(), 1)));
    assert_eq!(pieces.len(), N_VOCAB);
    let scores = (0..N_VOCAB).map(|i| -(i as f32)).collect();
    let (texts, kinds) = pieces.into_iter().unzip();
    (texts, scores, kinds)
}

// ---------------------------------------------------------------------------------------------
// Files that can be changed before they are written

#[derive(Clone)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) type_id: u32,
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Clone, Default)]
pub(crate) struct File {
    metadata: Vec<(String, Rc<dyn Put>)>,
    pub(crate) tensors: Vec<Part>,
}

impl File {
    pub(crate) fn set(&mut self, key: &str, value: impl Put + 'static) -> &mut File {
        let value: Rc<dyn Put> = Rc::new(value);
        match self.metadata.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_string(), value)),
        }
        self
    }

    pub(crate) fn with(&self, key: &str, value: impl Put + 'static) -> File {
        let mut file = self.clone();
        file.set(key, value);
        file
    }

    pub(crate) fn without(&self, key: &str) -> File {
        let mut file = self.clone();
        file.metadata.retain(|(k, _)| k != key);
        file
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Part {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }

    /// Part `no` of `count`: metadata in the first, tensors dealt out in runs.
    pub(crate) fn part(&self, no: usize, count: usize) -> Vec<u8> {
        let mut w = Writer::new();
        if no == 0 {
            self.metadata.iter().for_each(|(k, v)| {
                w.put(k, &**v);
            });
        }
        if count > 1 {
            w.put("split.no", no as u16)
                .put("split.count", count as u16)
                .put("split.tensors.count", self.tensors.len() as i32);
        }
        let n = self.tensors.len();
        let tensors = &self.tensors[n * no / count..n * (no + 1) / count];
        for t in tensors {
            w.tensor(&t.name, t.type_id, &t.shape);
        }
        let mut stream = w.start("part", Vec::new()).unwrap();
        for t in tensors {
            stream.write_tensor(&t.name, &t.bytes).unwrap();
        }
        stream.finish().unwrap()
    }
}
