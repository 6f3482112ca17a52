//! The door to small matrix products inside one task. libtorch's are for whole tensors and bring threads of their own.
#![allow(unsafe_code)]

pub mod pairs;

use gemm::Parallelism;

/// A matrix as it lies in a slice.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows of consecutive elements; each begins `stride` elements after the one before.
    pub fn new(values: &'a [f32], rows: usize, cols: usize, stride: usize) -> Matrix<'a> {
        let matrix = Matrix {
            values,
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
        };
        assert!(matrix.reach() <= values.len(), "a matrix lies within its slice");
        matrix
    }

    /// The transpose.
    pub fn t(self) -> Matrix<'a> {
        Matrix {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Elements from the slice's first to the matrix's last.
    fn reach(&self) -> usize {
        if self.rows == 0 || self.cols == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride + 1
    }
}

/// What a product is written to: rows of consecutive elements, `stride` apart.
pub struct Into<'a> {
    pub values: &'a mut [f32],
    pub stride: usize,
    /// Whether the product is added to what is there.
    pub add: bool,
}

/// `scale` · `a` · `b` on this thread.
pub fn product(a: Matrix, b: Matrix, scale: f32, into: Into) {
    assert_eq!(a.cols, b.rows, "the inner sides agree");
    let written = Matrix::new(into.values, a.rows, b.cols, into.stride);
    assert!(into.stride >= b.cols, "rows do not overlap");
    let (rows, cols) = (written.rows, written.cols);
    let strides = |matrix: &Matrix| (matrix.col_stride as isize, matrix.row_stride as isize);
    let ((a_cols, a_rows), (b_cols, b_rows)) = (strides(&a), strides(&b));
    // SAFETY: `Matrix::new` has checked that every element of the three lies within its slice, a transpose has the same
    // elements, and `into` is borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            rows,
            cols,
            a.cols,
            into.values.as_mut_ptr(),
            1,
            into.stride as isize,
            into.add,
            a.values.as_ptr(),
            a_cols,
            a_rows,
            b.values.as_ptr(),
            b_cols,
            b_rows,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_the_formula_in_any_layout() {
        // a is 2 × 3 with a gap after each row; b is 3 × 2 as the transpose of 2 × 3.
        let (a, b) = ([1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0, 9.0], [1.0, 0.0, 2.0, 3.0, 1.0, 1.0]);
        let mut y = [10.0f32; 6];
        let into = Into {
            values: &mut y,
            stride: 3,
            add: true,
        };
        product(Matrix::new(&a, 2, 3, 4), Matrix::new(&b, 2, 3, 3).t(), 2.0, into);
        assert_eq!(y, [24.0, 26.0, 10.0, 42.0, 56.0, 10.0]);
    }

    #[test]
    #[should_panic(expected = "within its slice")]
    fn a_matrix_beyond_its_slice_is_a_bug() {
        Matrix::new(&[0.0; 11], 3, 4, 4);
    }
}
