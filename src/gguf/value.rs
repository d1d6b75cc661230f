//! Metadata values, read in place.
