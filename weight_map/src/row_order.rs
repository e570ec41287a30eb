//! In which order a server holds the rows of a tensor.

use serde::{Deserialize, Serialize};

/// Order of a tensor's rows (of its elements, if it is a vector) in the server's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RowOrder {
    /// As in the files.
    #[default]
    AsFiles,
    /// Within each head of `head_dim` rows the first and the second half alternate.
    ///
    /// A rotary embedding turns pairs of rows. Hugging Face pairs row i with row i + head_dim/2, ggml's `NORM`
    /// kind, which llama.cpp runs `llama` models with, pairs row 2i with row 2i + 1.
    Interleaved {
        /// Rows of a head; even.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The place in the server's memory of row `row` of the files.
    pub fn in_server(self, row: usize) -> usize {
        match self {
            RowOrder::AsFiles => row,
            RowOrder::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * pair + half
            }
        }
    }

    /// The row of the files that lies at place `row` of the server's memory.
    pub fn in_files(self, row: usize) -> usize {
        match self {
            RowOrder::AsFiles => row,
            RowOrder::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + within % 2 * (head_dim / 2) + within / 2
            }
        }
    }

    /// Whether a tensor of `rows` rows can lie in this order.
    pub fn fits(self, rows: usize) -> bool {
        match self {
            RowOrder::AsFiles => true,
            RowOrder::Interleaved { head_dim } => {
                head_dim > 0 && head_dim.is_multiple_of(2) && rows.is_multiple_of(head_dim)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As llama.cpp's converter writes it: reshape(heads, 2, head_dim / 2).swapaxes(1, 2).
    #[test]
    fn the_halves_of_each_head_alternate() {
        let order = RowOrder::Interleaved { head_dim: 6 };
        let files: Vec<usize> = (0..12).map(|row| order.in_files(row)).collect();
        assert_eq!(files, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }

    #[test]
    fn there_and_back_is_the_same_row() {
        for order in [RowOrder::AsFiles, RowOrder::Interleaved { head_dim: 2 }, RowOrder::Interleaved { head_dim: 10 }]
        {
            for row in 0..40 {
                assert_eq!(order.in_files(order.in_server(row)), row, "{order:?}");
            }
        }
    }

    #[test]
    fn rows_that_are_no_whole_heads_do_not_fit() {
        assert!(RowOrder::Interleaved { head_dim: 4 }.fits(12));
        for (head_dim, rows) in [(4, 10), (3, 12), (0, 12)] {
            assert!(!RowOrder::Interleaved { head_dim }.fits(rows), "{head_dim} {rows}");
        }
        assert!(RowOrder::AsFiles.fits(7));
    }
}
