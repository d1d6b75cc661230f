//! Recipes: which format each tensor of a model gets.
//!
//! "Q4_K_M" is not a format but a mixture: most tensors in Q4_K, the ones where errors hurt most in
//! something finer. The rules are the reference's (llama.cpp, `src/llama-quant.cpp`), for models of
//! the llama architecture, with and without experts; a test holds them to the reference's own files for
//! every recipe (`tests/quantize.rs`).

use super::Format;

macro_rules! recipes {
    ($( $variant:ident = $id:literal, $name:literal, $base:ident, $about:literal; )*) => {
        /// A mixture of formats. The number is GGUF's `general.file_type`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types)]
        #[repr(u32)]
        pub enum Recipe { $(
            #[doc = $about]
            $variant = $id,
        )* }

        impl Recipe {
            /// Every recipe.
            pub const ALL: &'static [Recipe] = &[$(Recipe::$variant),*];

            /// The recipe's name as in the field, for example `Q4_K_M`.
            pub fn name(self) -> &'static str {
                match self { $( Recipe::$variant => $name, )* }
            }

            /// One line about it.
            pub fn about(self) -> &'static str {
                match self { $( Recipe::$variant => $about, )* }
            }

            /// The format of most tensors.
            pub fn base(self) -> Format {
                match self { $( Recipe::$variant => Format::$base, )* }
            }
        }
    };
}

recipes! {
    F32    = 0,  "F32",    F32,    "32-bit floats";
    F16    = 1,  "F16",    F16,    "16-bit floats";
    BF16   = 32, "BF16",   BF16,   "32-bit floats cut to 16 bits, as the weights were published";
    Q4_0   = 2,  "Q4_0",   Q4_0,   "4 bits, one scale for 32 weights";
    Q4_1   = 3,  "Q4_1",   Q4_1,   "4 bits, a scale and a minimum for 32 weights";
    Q5_0   = 8,  "Q5_0",   Q5_0,   "5 bits, one scale for 32 weights";
    Q5_1   = 9,  "Q5_1",   Q5_1,   "5 bits, a scale and a minimum for 32 weights";
    Q8_0   = 7,  "Q8_0",   Q8_0,   "8 bits, one scale for 32 weights";
    Q2_K   = 10, "Q2_K",   Q2_K,   "2 bits with scales of scales, 3 in the downs";
    Q3_K_S = 11, "Q3_K_S", Q3_K,   "3 bits with scales of scales";
    Q3_K_M = 12, "Q3_K_M", Q3_K,   "3 bits with scales of scales, 4 or 5 in the downs";
    Q3_K_L = 13, "Q3_K_L", Q3_K,   "3 bits with scales of scales, 5 in the downs";
    Q4_K_S = 14, "Q4_K_S", Q4_K,   "4 bits with scales of scales, 5 in the first downs";
    Q4_K_M = 15, "Q4_K_M", Q4_K,   "4 bits with scales of scales, 6 in half of the downs";
    Q5_K_S = 16, "Q5_K_S", Q5_K,   "5 bits with scales of scales";
    Q5_K_M = 17, "Q5_K_M", Q5_K,   "5 bits with scales of scales, 6 in half of the downs";
    Q6_K   = 18, "Q6_K",   Q6_K,   "6 bits with scales of scales";
    IQ4_NL = 25, "IQ4_NL", IQ4_NL, "4 bits for unevenly spaced values, one scale for 32 weights";
    IQ4_XS = 30, "IQ4_XS", IQ4_XS, "4 bits for unevenly spaced values with scales of scales";
}

impl Recipe {
    /// The recipe of this name, in any case; `Q3_K`, `Q4_K` and `Q5_K` mean their `_M`.
    pub fn from_name(name: &str) -> Option<Recipe> {
        let name = match name.to_ascii_uppercase().as_str() {
            short @ ("Q3_K" | "Q4_K" | "Q5_K") => format!("{short}_M"),
            name => name.to_string(),
        };
        Recipe::ALL.iter().copied().find(|r| r.name() == name)
    }

    /// The recipe's number in `general.file_type`.
    pub fn file_type(self) -> u32 {
        self as u32
    }

    /// Whether its base is a quantized format, so that its rules and overrides apply at all.
    pub fn is_quantized(self) -> bool {
        self.base().block_weights() > 1
    }
}

/// What the rules ask of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Layers.
    pub n_layer: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads.
    pub n_kv: usize,
    /// Experts in a layer; 0 or 1 in a dense model.
    pub n_expert: usize,
    /// Whether there is no `output.weight`, so that the embedding serves as one.
    pub tied: bool,
    /// `attn_v` tensors there are.
    pub n_attn_v: usize,
    /// Whether importance is known: some rules are only for one of the cases.
    pub importance: bool,
}

/// The roles of tensors that the rules know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `output.weight`.
    Output,
    /// `token_embd.weight`.
    Embedding,
    /// `attn_q`.
    Query,
    /// `attn_k`.
    Key,
    /// `attn_v`.
    Value,
    /// `attn_output`.
    AttentionOutput,
    /// `ffn_down`, of experts or of a dense model.
    Down,
    /// Any other.
    Other,
}

impl Role {
    /// The role that a tensor's name says.
    pub fn of(name: &str) -> Role {
        match name {
            "output.weight" => Role::Output,
            "token_embd.weight" => Role::Embedding,
            _ if name.contains("attn_v.weight") => Role::Value,
            _ if name.contains("attn_k.weight") => Role::Key,
            _ if name.contains("attn_q.weight") => Role::Query,
            _ if name.contains("attn_output.weight") => Role::AttentionOutput,
            _ if name.contains("ffn_down") => Role::Down,
            _ => Role::Other,
        }
    }
}

/// The number in `blk.N.…`.
pub fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// The order of tensors in files that the reference writes: by layer, those of no layer first, then
/// by name.
pub fn order(a: &str, b: &str) -> std::cmp::Ordering {
    (layer(a), a).cmp(&(layer(b), b))
}

/// Whether a tensor is ever quantized: matrices of weights, except norms and routers, which are small
/// and steer everything.
pub fn is_quantizable(name: &str, shape: &[u64]) -> bool {
    shape.iter().skip(1).any(|&d| d > 1)
        && name.ends_with("weight")
        && !name.contains("_norm.weight")
        && !name.contains("ffn_gate_inp.weight")
}

/// Chooses formats for the tensors of a model, which must come in [`order`]: some rules count.
#[derive(Clone, Debug)]
pub struct Chooser {
    recipe: Recipe,
    model: Traits,
    /// The format of the output matrix, if the user chose one.
    output: Option<Format>,
    /// `attn_v` and `ffn_down` tensors so far.
    values: usize,
    downs: usize,
}

impl Chooser {
    /// A chooser for a model. `output` is the user's choice for the output matrix, which also holds for
    /// an embedding that serves as one.
    pub fn new(recipe: Recipe, model: Traits, output: Option<Format>) -> Chooser {
        Chooser {
            recipe,
            model,
            output,
            values: 0,
            downs: 0,
        }
    }

    /// The format of the next tensor, which is one that [`is_quantizable`]. `columns` is the length
    /// of its rows; the format may not fit them yet ([`fitting`]).
    pub fn next(&mut self, name: &str, columns: u64) -> Format {
        use Format as F;
        use Recipe as R;
        let (recipe, m) = (self.recipe, self.model);
        let base = recipe.base();
        if !recipe.is_quantized() {
            return base;
        }
        let eight = m.n_expert == 8;
        match Role::of(name) {
            Role::Output => self.output_format(columns),
            Role::Embedding if m.tied => self.output_format(columns),
            Role::Value => {
                self.values += 1;
                match eight {
                    // Little beside eight experts, and sensitive.
                    true => F::Q8_0,
                    false => self.value_format(self.values - 1),
                }
            }
            Role::Key if eight => F::Q8_0,
            Role::Down => {
                self.downs += 1;
                // Experts may be scattered over a file; their names say the layer.
                let named = layer(name).filter(|_| m.n_expert > 1);
                self.down_format(named.unwrap_or(self.downs - 1))
            }
            Role::AttentionOutput if eight => match recipe {
                R::Q2_K | R::Q3_K_S | R::Q3_K_M | R::Q4_K_S | R::Q4_K_M | R::IQ4_NL | R::IQ4_XS => {
                    F::Q5_K
                }
                _ => base,
            },
            Role::AttentionOutput => match recipe {
                R::Q2_K => F::Q3_K,
                R::Q3_K_M => F::Q4_K,
                R::Q3_K_L => F::Q5_K,
                _ => base,
            },
            _ => base,
        }
    }

    /// The format of `attn_v` number `i`, in a model without eight experts.
    fn value_format(&self, i: usize) -> Format {
        use Format as F;
        use Recipe as R;
        let m = self.model;
        let groups = m.n_head / m.n_kv.max(1);
        let format = match self.recipe {
            R::Q2_K if groups >= 4 => F::Q4_K,
            R::Q2_K => F::Q3_K,
            R::Q3_K_M if i < 2 => F::Q5_K,
            R::Q3_K_M => F::Q4_K,
            R::Q3_K_L => F::Q5_K,
            R::IQ4_NL | R::IQ4_XS if groups >= 4 => F::Q5_K,
            R::Q4_K_M | R::Q5_K_M if more_bits(i, m.n_attn_v) => F::Q6_K,
            R::Q4_K_S if i < 4 => F::Q5_K,
            other => other.base(),
        };
        // The 70B model: eight heads share a value head, so that its values are few.
        let is_70b = m.n_layer == 80 && m.n_head != m.n_kv;
        match format {
            F::Q3_K | F::Q4_K if is_70b => F::Q5_K,
            format => format,
        }
    }

    /// The format of the downs of layer `i`.
    fn down_format(&self, i: usize) -> Format {
        use Format as F;
        use Recipe as R;
        let (n, importance) = (self.model.n_layer, self.model.importance);
        match self.recipe {
            R::Q2_K => F::Q3_K,
            R::Q3_K_M if i < n / 16 => F::Q5_K,
            R::Q3_K_M => F::Q4_K,
            R::Q3_K_L => F::Q5_K,
            R::Q4_K_M | R::Q5_K_M if more_bits(i, n) => F::Q6_K,
            R::Q4_K_S if i < n / 8 => F::Q5_K,
            R::IQ4_NL | R::IQ4_XS if i < n / 8 && !importance => F::Q5_K,
            // With importance the first downs can go astray in formats without a minimum.
            R::Q4_0 if i < n / 8 && importance => F::Q4_1,
            R::Q5_0 if i < n / 8 && importance => F::Q5_1,
            other => other.base(),
        }
    }

    fn output_format(&self, columns: u64) -> Format {
        let base = self.recipe.base();
        match self.output {
            Some(format) => format,
            None if !columns.is_multiple_of(base.block_weights() as u64) => Format::Q8_0,
            None if base == Format::Q8_0 => base,
            None => Format::Q6_K,
        }
    }
}

/// The layers that get more bits in the `_M` mixtures: the first and last eighth, and every third between.
fn more_bits(i: usize, n: usize) -> bool {
    i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
}

/// `format`, or a similar one whose blocks fit rows of this length: smaller blocks, or F16.
pub fn fitting(format: Format, columns: u64) -> Format {
    let fits = |f: Format| columns.is_multiple_of(f.block_weights() as u64);
    if fits(format) {
        return format;
    }
    let smaller = match format {
        Format::IQ4_XS => Format::IQ4_NL,
        Format::Q2_K | Format::Q3_K => Format::Q4_0,
        Format::Q4_K => Format::Q5_0,
        Format::Q5_K => Format::Q5_1,
        Format::Q6_K => Format::Q8_0,
        other => other,
    };
    if fits(smaller) { smaller } else { Format::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mixtral 8x7B's mixture, from the published recipe: downs of 32 layers in Q4_K_M.
    #[test]
    fn q4_k_m_of_mixtral() {
        let model = Traits {
            n_layer: 32,
            n_head: 32,
            n_kv: 8,
            n_expert: 8,
            tied: false,
            n_attn_v: 32,
            importance: false,
        };
        let mut chooser = Chooser::new(Recipe::Q4_K_M, model, None);
        let mut fine = Vec::new();
        for i in 0..32 {
            let name = |part: &str| format!("blk.{i}.{part}.weight");
            assert_eq!(chooser.next(&name("attn_v"), 4096), Format::Q8_0);
            assert_eq!(chooser.next(&name("attn_k"), 4096), Format::Q8_0);
            assert_eq!(chooser.next(&name("attn_q"), 4096), Format::Q4_K);
            assert_eq!(chooser.next(&name("attn_output"), 4096), Format::Q5_K);
            assert_eq!(chooser.next(&name("ffn_gate_exps"), 4096), Format::Q4_K);
            match chooser.next(&name("ffn_down_exps"), 14336) {
                Format::Q6_K => fine.push(i),
                other => assert_eq!(other, Format::Q4_K),
            }
        }
        let expected = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31];
        assert_eq!(fine, expected);
        assert_eq!(chooser.next("output.weight", 4096), Format::Q6_K);
        assert_eq!(chooser.next("token_embd.weight", 4096), Format::Q4_K);
    }

    #[test]
    fn fallbacks_fit() {
        for &format in Format::ALL {
            for columns in [1u64, 32, 96, 256, 288, 512] {
                let fit = fitting(format, columns);
                assert!(columns.is_multiple_of(fit.block_weights() as u64));
                if columns == 256 {
                    assert_eq!(fit, format);
                }
            }
        }
        assert_eq!(fitting(Format::Q4_K, 288), Format::Q5_0);
        assert_eq!(fitting(Format::Q4_K, 33), Format::F16);
    }

    #[test]
    fn names_of_recipes_and_order_of_tensors() {
        for &r in Recipe::ALL {
            assert_eq!(Recipe::from_name(&r.name().to_lowercase()), Some(r));
        }
        assert_eq!(Recipe::from_name("q5_k"), Some(Recipe::Q5_K_M));
        assert_eq!(Recipe::from_name("Q4_K_XL"), None);
        let mut names = ["blk.10.a", "blk.2.b", "token_embd", "blk.2.a", "output"];
        names.sort_by(|a, b| order(a, b));
        assert_eq!(
            names,
            ["output", "token_embd", "blk.2.a", "blk.2.b", "blk.10.a"]
        );
    }
}
