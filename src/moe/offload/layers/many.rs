//! Passes of many tokens: gathered by expert, layer by layer. Experts that are not there pass through the device where enough tokens
//! chose them, while it computes with those that are, and the host with the others.

use super::{Layout, pattern};
use crate::gguf::Bytes;
use crate::moe::offload::driver::{CHOSEN, Driver, Launch, TURNS};
use crate::moe::offload::gpu::{Gpu, Link, parts};
use crate::moe::offload::{Absent, Fault, Host, Pass, Share};
use crate::moe::router::Choice;
use crate::moe::weights::Expert;
use crate::pool::apart;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// A thread that copies one expert after the other into slots by turns, and begins what is to be done with each when it has
/// arrived. A slot is not written before the kernels of whoever was there have ended.
pub(super) struct Stream {
    jobs: Sender<Passing>,
    done: Receiver<Result<(), Fault>>,
}

/// An expert that passes through the device.
struct Passing {
    /// Which of the slots.
    turn: usize,
    parts: Vec<(u64, Bytes)>,
    launches: Vec<Launch>,
}

impl Stream {
    fn new<D: Driver>(driver: Arc<D>, link: Arc<Link>) -> Result<Stream, Fault> {
        let (jobs, passing) = channel::<Passing>();
        let (said, done) = channel();
        let run = move || {
            for job in passing {
                let Passing {
                    turn,
                    parts,
                    launches,
                } = job;
                // SAFETY: `many` made them for this expert in this slot, where it is now; it launches nothing itself until it has
                // heard of all.
                let begin = |launch: &Launch| unsafe { launch.begin(&*driver) };
                let done = driver
                    .reached(turn)
                    .and_then(|()| link.copy(&*driver, parts.into_iter()))
                    .and_then(|()| launches.iter().try_for_each(begin))
                    .and_then(|()| driver.mark(turn));
                if said.send(done).is_err() {
                    return;
                }
            }
        };
        apart("octet-gpu-stream", run).map_err(|e| Fault::Lost(e.to_string()))?;
        Ok(Stream { jobs, done })
    }
}

/// Who computes which experts of a layer.
struct Deal<'a> {
    /// The device: those that are there, then those that pass through.
    shares: Vec<Share<'a>>,
    /// How many of them are there.
    resident: usize,
    /// The host.
    absent: Vec<Absent>,
    /// `(n_tok · n_used)` The row of each choice: the shares' come first, in their order, then those of the absent.
    home: Vec<u32>,
}

impl<'a> Deal<'a> {
    /// `homes[e]`: the choices of expert `e` in a layer, `token · n_used + rank`; `picks[e]`: their tokens.
    fn new(pass: &Pass<'a>, layer: usize, homes: &[Vec<u32>], picks: &'a [Vec<u32>]) -> Deal<'a> {
        let experts = &pass.weights.layers[layer].experts;
        let slots = &pass.layers[layer].experts;
        let formats = |e: &Expert| e.weights().map(|w| w.format);
        let known = pattern(pass, layer).map(formats);
        let passes =
            |e: usize| picks[e].len() >= pass.stream_from && known == Some(formats(&experts[e]));
        let mut chosen: Vec<usize> = (0..experts.len()).collect();
        chosen.retain(|e| !picks[*e].is_empty());
        let (here, away): (Vec<_>, Vec<_>) = chosen.iter().partition(|e| slots[**e].is_some());
        let (through, left): (Vec<_>, Vec<_>) = away.into_iter().partition(|e| passes(*e));

        let mut home = vec![0; homes.iter().map(Vec::len).sum()];
        let order = here.iter().chain(&through).chain(&left);
        for (row, at) in order.flat_map(|e| &homes[*e]).enumerate() {
            home[*at as usize] = row as u32;
        }
        let share = |e: &usize, slot| Share {
            slot,
            expert: &experts[*e],
            pick: &picks[*e],
        };
        let ring = pass.ring.iter().cycle();
        let resident = here
            .iter()
            .map(|e| share(e, slots[*e].expect("it is there")));
        let passing = through.iter().zip(ring).map(|(e, slot)| share(e, *slot));
        Deal {
            shares: resident.chain(passing).collect(),
            resident: here.len(),
            absent: (left.into_iter())
                .map(|expert| Absent {
                    expert,
                    pick: picks[expert].clone(),
                })
                .collect(),
            home,
        }
    }

    /// Rows of the shares.
    fn rows(&self) -> usize {
        self.shares.iter().map(|share| share.pick.len()).sum()
    }
}

impl<D: Driver> Gpu<D> {
    /// All layers and the head; false if the host has ended it.
    pub(super) fn many(
        &mut self,
        pass: &Pass<'_>,
        lay: &Layout,
        host: &mut dyn Host,
    ) -> Result<bool, Fault> {
        let c = pass.config;
        for layer in 0..c.n_layer {
            self.attention(pass, lay, layer, false)?;
            let mut homes: Vec<Vec<u32>> = vec![Vec::new(); c.n_expert];
            let choices: Vec<Choice> = self.choices(pass, lay, layer)?;
            for (at, choice) in choices.iter().enumerate() {
                homes[choice.expert as usize].push(at as u32);
            }
            let token = |at: &u32| at / c.n_used as u32;
            let picks = homes.iter().map(|its| its.iter().map(token).collect());
            let picks: Vec<Vec<u32>> = picks.collect();
            let deal = Deal::new(pass, layer, &homes, &picks);
            if !deal.absent.is_empty() {
                self.driver.mark(CHOSEN)?;
            }
            let home = self.begin_experts(pass, lay, &deal)?;
            if !self.end_experts(pass, lay, layer, &deal, host)? {
                return Ok(false);
            }
            self.combine(pass, lay, layer, home, 0)?;
            if host.passed(layer).is_break() {
                return Ok(false);
            }
        }
        self.head(pass, lay, 0)?;
        Ok(true)
    }

    /// Begins the experts that are there, and has those that pass through begin when they have come. Returns where the device has
    /// the row of each choice.
    fn begin_experts(
        &mut self,
        pass: &Pass<'_>,
        lay: &Layout,
        deal: &Deal<'_>,
    ) -> Result<u64, Fault> {
        let table = self.rows(&deal.shares);
        let sent = self.send(&table, lay.n_tok, &[], &deal.home)?;
        let Some(Share { expert, .. }) = deal.shares.first() else {
            return Ok(sent.homes);
        };
        let gate = &expert.gate;
        // Since the norm.
        let x = lay.acts(gate, lay.n_tok);
        let (here, passing) = deal.shares.split_at(deal.resident);
        let mut row = here.iter().map(|share| share.pick.len()).sum();
        if !here.is_empty() {
            let launches = self.launches(here, &table[..row], &sent, x, lay.out);
            // SAFETY: as `launches` says; `arrange` made room for all rows.
            unsafe { self.begin(launches)? };
        }
        for (i, share) in passing.iter().enumerate() {
            let (rows, its) = (row..row + share.pick.len(), sent.behind(row));
            let out = lay.out + (4 * row * gate.n_in) as u64;
            row = rows.end;
            let alone = std::slice::from_ref(share);
            let launches = self.launches(alone, &table[rows], &its, x, out);
            self.pass_through(i % pass.ring.len(), share, launches)?;
        }
        Ok(sent.homes)
    }

    /// Has an expert brought into a slot, and `launches` begun then.
    fn pass_through(
        &mut self,
        turn: usize,
        share: &Share<'_>,
        launches: Vec<Launch>,
    ) -> Result<(), Fault> {
        assert!(turn < TURNS);
        let weights = share.expert.weights();
        let (starts, _) = parts(&weights);
        let at = self.at(share.slot);
        let parts = starts.iter().zip(weights);
        let parts = parts.map(|(start, w)| (at + start, w.bytes.clone()));
        let job = Passing {
            turn,
            parts: parts.collect(),
            launches,
        };
        if self.lasting.stream.is_none() {
            self.lasting.stream = Some(Stream::new(
                Arc::clone(&self.driver),
                Arc::clone(&self.link),
            )?);
        }
        let stream = self.lasting.stream.as_ref().expect("it was just made");
        let gone = |_| Fault::Lost("the thread that copies has ended".into());
        stream.jobs.send(job).map_err(gone)
    }

    /// Has the host do its experts while others come through the device, and waits for those. False if the host has ended the
    /// pass.
    fn end_experts(
        &mut self,
        pass: &Pass<'_>,
        lay: &Layout,
        layer: usize,
        deal: &Deal<'_>,
        host: &mut dyn Host,
    ) -> Result<bool, Fault> {
        let (d, absent) = (pass.config.d_model, &deal.absent);
        let n: usize = absent.iter().map(|a| a.pick.len()).sum();
        let mut theirs = vec![0.0; n * d];
        let mut helped = Ok(true);
        if !absent.is_empty() {
            helped = self
                .normed(lay, d)
                .map(|h| host.experts(layer, &h, absent, &mut theirs));
        }
        // In any case: while one is on its way, nobody else may launch anything.
        for _ in &deal.shares[deal.resident..] {
            let stream = self.lasting.stream.as_ref().expect("jobs were sent");
            let ended = Fault::Lost("the thread that copies has ended".into());
            let done = stream.done.recv().unwrap_or(Err(ended));
            helped = helped.and_then(|goes_on| done.map(|()| goes_on));
        }
        let goes_on = helped?;
        if goes_on && n > 0 {
            let at = lay.out + (4 * deal.rows() * d) as u64;
            self.driver.write(at, bytemuck::cast_slice(&theirs))?;
        }
        Ok(goes_on)
    }
}
