//! Answers with guesses are the answers without: the same tokens, the same bits of logits.

use crate::program::DEMO;
use octet::chat::constraint::{Compiler, Form};
use octet::chat::draft::Draft;
use octet::chat::sampler::{Sampler, SamplerOptions};
use octet::chat::session::{Answer, Event, Finish, Limits, Session};
use octet::chat::tokenizer::Tokenizer;
use octet::gguf::Gguf;
use octet::moe::{KvType, Machine, Model};
use std::ops::ControlFlow;
use std::sync::Arc;

const COPY: &str = "The king said: bring me the golden bird. The queen said: bring me the golden bird. The king said: bring me";

struct Demo {
    model: Model,
    tokenizer: Arc<Tokenizer>,
}

impl Demo {
    fn new() -> Demo {
        let file = Gguf::open(DEMO.as_ref()).unwrap();
        Demo {
            model: Model::open(&file, Machine::new(2, None).unwrap()).unwrap(),
            tokenizer: Arc::new(Tokenizer::from_gguf(&file).unwrap()),
        }
    }

    fn prompt(&self, text: &str) -> Vec<u32> {
        [vec![1], self.tokenizer.encode(text)].concat()
    }

    fn session(&self, draft: Draft, ctx: usize) -> Session<'_> {
        let mut session = Session::new(&self.model, KvType::F16, ctx, 512);
        session.set_draft(draft);
        session
    }
}

fn answer(
    session: &mut Session<'_>,
    prompt: &[u32],
    sampler: &mut Sampler,
    limits: &Limits,
) -> Answer {
    let go_on = |_| ControlFlow::Continue(());
    session.answer(prompt, sampler, limits, go_on).unwrap()
}

#[track_caller]
fn same(got: &Answer, want: &Answer) {
    assert_eq!((&got.tokens, got.finish), (&want.tokens, want.finish));
    assert_eq!(got.stats.hash, want.stats.hash);
    assert_eq!((&got.top, &got.logprobs), (&want.top, &want.logprobs));
    assert_eq!(got.stats.steps, want.stats.steps);
}

#[test]
fn guesses_change_no_bit() {
    let demo = Demo::new();
    let limits = Limits {
        max_tokens: Some(32),
        stop: demo.tokenizer.stop_ids(),
        logprobs: 2,
    };
    let sampled = SamplerOptions {
        seed: Some(3),
        dry_multiplier: 0.5,
        xtc_probability: 0.3,
        frequency_penalty: 0.2,
        ..SamplerOptions::default()
    };
    let greedy = SamplerOptions {
        temp: 0.0,
        ..SamplerOptions::default()
    };
    let mirostat = SamplerOptions {
        mirostat: true,
        mirostat_ent: 2.0,
        ..sampled.clone()
    };
    let mut accepted = 0;
    for options in [sampled, greedy, mirostat] {
        for text in [COPY, "na na na na na na na"] {
            let prompt = demo.prompt(text);
            let run = |draft: Draft| {
                let mut sampler = Sampler::for_text(options.clone(), &demo.tokenizer);
                let mut session = demo.session(draft, 2048);
                let first = answer(&mut session, &prompt, &mut sampler, &limits);
                // The cache holds what was drawn and nothing else.
                let more = [&prompt[..], &first.tokens, &[300, 301]].concat();
                let second = answer(&mut session, &more, &mut sampler, &limits);
                // What the router did for wrong guesses does not count.
                let routes: Vec<_> = session.routes.layers().map(<[u64]>::to_vec).collect();
                (first, second, (session.len(), routes))
            };
            let want = run(Draft::Off);
            assert_eq!(want.0.stats.drafted, 0);
            for draft in [Draft::Auto, Draft::Fixed(1), Draft::Fixed(6)] {
                let got = run(draft);
                same(&got.0, &want.0);
                same(&got.1, &want.1);
                assert_eq!(got.2, want.2);
                assert_eq!(got.1.stats.prompt_tokens, want.1.stats.prompt_tokens);
                accepted += got.0.stats.accepted;
                let stats = &got.0.stats;
                assert_eq!(stats.steps, stats.passes + stats.accepted);
            }
        }
    }
    assert!(accepted > 30, "{accepted}");
}

#[test]
fn guesses_save_passes_where_text_repeats_itself() {
    let demo = Demo::new();
    let limits = Limits {
        max_tokens: Some(100),
        ..Limits::default()
    };
    let options = SamplerOptions {
        temp: 0.0,
        // The model likes to repeat itself.
        repeat_penalty: 0.8,
        ..SamplerOptions::default()
    };
    let prompt = demo.prompt(COPY);
    let mut session = demo.session(Draft::Fixed(8), 2048);
    let stats = answer(&mut session, &prompt, &mut Sampler::new(options), &limits).stats;
    assert_eq!(stats.answer_tokens, 100);
    assert!(stats.passes < 50, "{stats:?}");
}

#[test]
fn answers_end_where_they_would_without_guesses() {
    let demo = Demo::new();
    let options = SamplerOptions {
        temp: 0.0,
        repeat_penalty: 0.8,
        ..SamplerOptions::default()
    };
    let prompt = demo.prompt(COPY);
    let run = |draft: Draft, ctx: usize, limits: &Limits| {
        let mut session = demo.session(draft, ctx);
        let mut sampler = Sampler::new(options.clone());
        (
            answer(&mut session, &prompt, &mut sampler, limits),
            session.len(),
        )
    };
    let whole = run(
        Draft::Off,
        2048,
        &Limits {
            max_tokens: Some(40),
            ..Limits::default()
        },
    )
    .0;
    let full = prompt.len() + 20;
    for (ctx, limits, finish) in [
        (full, Limits::default(), Finish::ContextFull),
        (
            2048,
            Limits {
                max_tokens: Some(7),
                ..Limits::default()
            },
            Finish::Length,
        ),
        (
            2048,
            Limits {
                max_tokens: Some(0),
                ..Limits::default()
            },
            Finish::Length,
        ),
        (
            2048,
            Limits {
                stop: vec![whole.tokens[9]],
                ..Limits::default()
            },
            Finish::Stop,
        ),
    ] {
        let want = run(Draft::Off, ctx, &limits);
        assert_eq!(want.0.finish, finish);
        for n in 1..12 {
            let got = run(Draft::Fixed(n), ctx, &limits);
            same(&got.0, &want.0);
            assert_eq!(got.1, want.1, "tokens in the cache");
        }
    }
    // Whoever has seen enough gets no further token, even if some are ready.
    let mut session = demo.session(Draft::Fixed(8), 2048);
    let mut seen = 0;
    let stopped = session.answer(
        &prompt,
        &mut Sampler::new(options.clone()),
        &Limits::default(),
        |e| {
            seen += usize::from(matches!(e, Event::Token(_)));
            match seen < 12 {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        },
    );
    let stopped = stopped.unwrap();
    assert_eq!((stopped.finish, seen), (Finish::Interrupted, 12));
    assert_eq!(stopped.tokens, whole.tokens[..12]);
    assert_eq!(session.len(), prompt.len() + 11);
}

#[test]
fn what_a_grammar_forces_is_guessed() {
    let demo = Demo::new();
    let compiler = Compiler::new(&demo.tokenizer, &demo.tokenizer.stop_ids()).unwrap();
    let schema = r#"{"type":"object","properties":{"the_first_long_name":{"type":"boolean"},"another_long_name":{"enum":["a","b"]}},
        "required":["the_first_long_name","another_long_name"],"additionalProperties":false}"#;
    let limits = Limits {
        stop: demo.tokenizer.stop_ids(),
        ..Limits::default()
    };
    for seed in 0..4 {
        let run = |draft: Draft| {
            let constraint = compiler
                .compile(Form::JsonSchema, "test", schema, false)
                .unwrap();
            let mut sampler = Sampler::new(SamplerOptions {
                seed: Some(seed),
                temp: 1.5,
                ..SamplerOptions::default()
            });
            sampler.constrain(Some(constraint));
            let prompt = demo.prompt(COPY);
            answer(
                &mut demo.session(draft, 2048),
                &prompt,
                &mut sampler,
                &limits,
            )
        };
        let want = run(Draft::Off);
        assert_eq!(want.finish, Finish::Stop);
        for draft in [Draft::Auto, Draft::Fixed(2), Draft::Fixed(16)] {
            same(&run(draft), &want);
        }
        let stats = run(Draft::Fixed(16)).stats;
        assert!(stats.passes < stats.steps / 2, "{stats:?}");
    }
}
