#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("json_schema", json_schema, schema_seeds);
