//! A GGUF file: its header is read and checked when it is opened, its weights stay where they are.
