//! The checkpoint protocol on a simulated disk: every state that a crash may leave is opened.

#[path = "../common/mod.rs"]
mod common;

mod barriers;
mod check;
mod choices;
mod disk;
mod exhaustive;
mod faults;
mod image;
mod medium;
mod medium_tests;
mod random;
mod states;
mod world;
