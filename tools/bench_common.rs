//! What all benches of this folder are told and print.

use clap::Args;
use octet::cli::options::parse_tier;
use octet::cli::table::{Form, Table};
use octet::error::Result;
use octet::moe::Machine;
use octet::simd::{Tier, available};
use std::io::Write;

/// Options of every bench.
#[derive(Args)]
pub(crate) struct Common {
    /// CPU tiers [default: all that this CPU has]
    #[arg(long, value_delimiter = ',', value_parser = parse_tier)]
    isa: Vec<Tier>,
    /// CPU threads
    #[arg(short, long, default_value_t = 1)]
    pub(crate) threads: usize,
    /// A Markdown table
    #[arg(long)]
    markdown: bool,
    /// Said by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Common {
    /// The tiers to try, slower ones first.
    pub(crate) fn tiers(&self) -> Vec<Tier> {
        let mut tiers = available();
        tiers.retain(|tier| self.isa.is_empty() || self.isa.contains(tier));
        tiers
    }

    /// The machine at this tier.
    pub(crate) fn machine(&self, tier: Tier) -> Result<Machine> {
        Machine::new(self.threads, Some(tier))
    }

    /// Begins a table: prints `said` and what stands above the rows, `settings` of which are known before.
    pub(crate) fn table(
        &self,
        said: &str,
        names: &[&str],
        settings: &[Vec<String>],
        figures: &[&str],
    ) -> Table {
        let form = match self.markdown {
            true => Form::Markdown,
            false => Form::Plain,
        };
        let table = Table::new(form, names, settings, figures);
        say(&format!("{} threads{said}\n", self.threads));
        say(table.head());
        table
    }
}

/// Prints at once: rows come slowly.
pub(crate) fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
