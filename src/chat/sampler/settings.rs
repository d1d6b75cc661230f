//! The settings of the samplers: what each is called, what it means, how it is written.
//!
//! The command line, its help, `/set` in a conversation and the fields of a batch line all go through
//! [`Setting`]; the rows stand beside the samplers that they belong to ([`super::STEPS`]).

use super::{STEPS, SamplerOptions, Step};
use crate::near::did_you_mean;

/// One thing that a user may set.
pub struct Setting {
    /// llama.cpp's name, without the dashes in front.
    pub name: &'static str,
    /// Other names for it.
    pub aliases: &'static [&'static str],
    /// What stands for its value in help texts.
    pub value: &'static str,
    /// What it does.
    pub help: &'static str,
    pub(super) field: fn(&mut SamplerOptions) -> &mut dyn Value,
}

/// A row of the tables.
pub(super) const fn setting(
    name: &'static str,
    value: &'static str,
    help: &'static str,
    field: fn(&mut SamplerOptions) -> &mut dyn Value,
) -> Setting {
    Setting {
        name,
        aliases: &[],
        value,
        help,
        field,
    }
}

impl Setting {
    /// The same with other names besides.
    pub(super) const fn or(self, aliases: &'static [&'static str]) -> Setting {
        Setting { aliases, ..self }
    }

    /// Its value, as it may be written.
    pub fn get(&self, options: &SamplerOptions) -> String {
        (self.field)(&mut options.clone()).write()
    }

    /// Sets it to what a text says. A list takes one more entry; `none` empties it.
    ///
    /// # Errors
    /// What was expected. The options are unchanged then.
    pub fn set(&self, options: &mut SamplerOptions, text: &str) -> Result<(), String> {
        (self.field)(options).read(text)
    }

    /// Whether it is a list, so that it may be given several times.
    pub fn is_list(&self) -> bool {
        (self.field)(&mut SamplerOptions::default()).is_list()
    }

    /// Texts that may stand for its value, or for an entry of it, if there are but a few.
    pub fn choices(&self) -> Vec<&'static str> {
        (self.field)(&mut SamplerOptions::default()).choices()
    }

    /// Whether `name` means this one; dashes in front, and `_` for `-`, are as good.
    pub fn is_called(&self, name: &str) -> bool {
        let name = name.trim_start_matches('-').replace('_', "-");
        self.name == name || self.aliases.contains(&name.as_str())
    }
}

/// A kind of value: how it is read and written.
pub(super) trait Value {
    /// Takes what a text says; else says what was expected.
    fn read(&mut self, text: &str) -> Result<(), String>;
    /// The text that reads as this.
    fn write(&self) -> String;
    /// Whether [`Value::read`] adds.
    fn is_list(&self) -> bool {
        false
    }
    /// See [`Setting::choices`].
    fn choices(&self) -> Vec<&'static str> {
        Vec::new()
    }
}

/// A number: `nan` and `inf` parse as f32 but make no sense as a setting.
impl Value for f32 {
    fn read(&mut self, text: &str) -> Result<(), String> {
        match text.parse::<f32>() {
            Ok(x) if x.is_finite() => *self = x,
            _ => return Err("expected a number".into()),
        }
        Ok(())
    }

    fn write(&self) -> String {
        self.to_string()
    }
}

/// A number of tokens; -1 is "all there are" in llama.cpp, and here.
impl Value for usize {
    fn read(&mut self, text: &str) -> Result<(), String> {
        *self = match text {
            "-1" => usize::MAX,
            _ => text
                .parse()
                .map_err(|_| "expected a number of tokens, or -1 for all")?,
        };
        Ok(())
    }

    fn write(&self) -> String {
        match *self {
            usize::MAX => "-1".into(),
            n => n.to_string(),
        }
    }
}

/// A seed; -1 takes one from the clock.
impl Value for Option<u64> {
    fn read(&mut self, text: &str) -> Result<(), String> {
        *self = match text {
            "-1" => None,
            _ => Some(text.parse().map_err(|_| "expected a whole number, or -1")?),
        };
        Ok(())
    }

    fn write(&self) -> String {
        self.map_or("-1".into(), |seed| seed.to_string())
    }
}

/// Whether mirostat is on, by its version.
impl Value for bool {
    fn read(&mut self, text: &str) -> Result<(), String> {
        *self = match text {
            "0" => false,
            "2" => true,
            _ => return Err("expected 0 (off) or 2".into()),
        };
        Ok(())
    }

    fn write(&self) -> String {
        if *self { "2" } else { "0" }.into()
    }

    fn choices(&self) -> Vec<&'static str> {
        vec!["0", "2"]
    }
}

/// Biases of single tokens.
impl Value for Vec<(u32, f32)> {
    fn read(&mut self, text: &str) -> Result<(), String> {
        if text == "none" {
            self.clear();
            return Ok(());
        }
        let bad = || "expected ID+BIAS or ID-BIAS, such as 29871-1.5".to_string();
        let at = text.find(['+', '-']).ok_or_else(bad)?;
        let id = text[..at].parse().map_err(|_| bad())?;
        let bias: f32 = text[at..].parse().map_err(|_| bad())?;
        if bias.is_nan() {
            return Err(bad());
        }
        self.push((id, bias));
        Ok(())
    }

    fn write(&self) -> String {
        list(self.iter().map(|(id, bias)| format!("{id}{bias:+}")))
    }

    fn is_list(&self) -> bool {
        true
    }

    fn choices(&self) -> Vec<&'static str> {
        vec!["none"]
    }
}

/// Texts, with `\n`, `\t`, `\"` and `\\` for what a command line can hardly say.
impl Value for Vec<String> {
    fn read(&mut self, text: &str) -> Result<(), String> {
        match unescape(text) {
            _ if text == "none" => self.clear(),
            None => {
                return Err("expected only \\n, \\r, \\t, \\\" and \\\\ with a backslash".into());
            }
            // llama.cpp's limit, too.
            Some(text) if (1..=40).contains(&text.len()) => self.push(text),
            Some(_) => return Err("expected 1 to 40 bytes".into()),
        }
        Ok(())
    }

    fn write(&self) -> String {
        list(self.iter().map(|text| format!("{text:?}")))
    }

    fn is_list(&self) -> bool {
        true
    }

    fn choices(&self) -> Vec<&'static str> {
        vec!["none"]
    }
}

fn list(entries: impl Iterator<Item = String>) -> String {
    let entries: Vec<_> = entries.collect();
    match entries.is_empty() {
        true => "none".into(),
        false => entries.join(" "),
    }
}

/// A text in which `\n`, `\r`, `\t`, `\"` and `\\` stand for what a command line can hardly say; `None` for another backslash.
pub fn unescape(text: &str) -> Option<String> {
    let mut chars = text.chars();
    let mut out = String::new();
    while let Some(c) = chars.next() {
        out.push(match c {
            '\\' => match chars.next()? {
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                c @ ('"' | '\\') => c,
                _ => return None,
            },
            c => c,
        });
    }
    Some(out)
}

/// The samplers to use, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Order(pub(super) Vec<&'static Step>);

/// Names separated by `;` (llama.cpp's way) or `,`; `none` is none.
impl Value for Order {
    fn read(&mut self, text: &str) -> Result<(), String> {
        let names = text.split([';', ',']).map(str::trim);
        let steps = names.filter(|name| !name.is_empty() && *name != "none");
        let steps = steps.map(|name| {
            let name = name.replace('-', "_");
            STEPS
                .iter()
                .find(|step| step.name == name || step.aliases.contains(&name.as_str()))
                .ok_or_else(|| {
                    let names: Vec<_> = STEPS.iter().map(|step| step.name).collect();
                    let meant = did_you_mean(&name, names.iter().copied());
                    let meant = meant.map_or(String::new(), |meant| format!("; {meant}"));
                    format!(
                        "expected some of {} separated by ;, found {name}{meant}",
                        names.join(";")
                    )
                })
        });
        self.0 = steps.collect::<Result<_, _>>()?;
        Ok(())
    }

    fn write(&self) -> String {
        let names: Vec<_> = self.0.iter().map(|step| step.name).collect();
        match names.is_empty() {
            true => "none".into(),
            false => names.join(";"),
        }
    }

    fn choices(&self) -> Vec<&'static str> {
        let names = STEPS.iter().map(|step| step.name);
        names.chain(["none"]).collect()
    }
}
