//! From people to tokens and back.
