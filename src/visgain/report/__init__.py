"""The measurement made visible: one self-contained HTML file, and one sample in the terminal."""
