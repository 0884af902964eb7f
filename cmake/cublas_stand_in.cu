// What a bundle brings in place of cuBLAS, which is 0.5 GB, to a machine that has none: the functions that llama.cpp's CUDA
// backend calls, computed by plain kernels. llama.cpp multiplies quantised weights by itself, and few rows of others; what is
// left are prompts with weights of 16 and 32 bits, and attention where flash attention cannot be had. That is right with
// this, and slow. `tests/gpu/test_cublas.py` compares it, or cuBLAS, with NumPy.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

struct Handle {
    cudaStream_t stream = nullptr;
};

// A column-major matrix of a batch: an array of pointers on the device, or one pointer and a stride.
struct Matrix {
    const void * data;
    const void * const * each;
    long long stride;
    int ld;
    cudaDataType type;

    __device__ char * at(int batch, int row, int column) const {
        const size_t size = type == CUDA_R_32F ? 4 : 2;
        const char * start = each ? (const char *) each[batch] : (const char *) data + batch * stride * (long long) size;
        return const_cast<char *>(start) + (row + (long long) column * ld) * (long long) size;
    }

    __device__ float get(int batch, int row, int column) const {
        const char * p = at(batch, row, column);
        return type == CUDA_R_32F ? *(const float *) p : type == CUDA_R_16F ? __half2float(*(const __half *) p)
                                                       : __bfloat162float(*(const __nv_bfloat16 *) p);
    }

    __device__ void set(int batch, int row, int column, float value) const {
        char * p = at(batch, row, column);
        if (type == CUDA_R_32F) {
            *(float *) p = value;
        } else if (type == CUDA_R_16F) {
            *(__half *) p = __float2half(value);
        } else {
            *(__nv_bfloat16 *) p = __float2bfloat16(value);
        }
    }
};

constexpr int TILE = 16;

// C = alpha * op(A) op(B) + beta * C, a block for each tile of C; grid.z counts the batch.
__global__ void multiply(bool ta, bool tb, int m, int n, int k, float alpha, Matrix a, Matrix b, float beta, Matrix c) {
    __shared__ float left[TILE][TILE + 1], right[TILE][TILE + 1];
    const int batch = blockIdx.z, row = blockIdx.x * TILE + threadIdx.x, column = blockIdx.y * TILE + threadIdx.y;
    float sum = 0;
    for (int start = 0; start < k; start += TILE) {
        const int of_a = start + threadIdx.y, of_b = start + threadIdx.x;
        left[threadIdx.x][threadIdx.y] =
            row < m && of_a < k ? (ta ? a.get(batch, of_a, row) : a.get(batch, row, of_a)) : 0;
        right[threadIdx.x][threadIdx.y] =
            column < n && of_b < k ? (tb ? b.get(batch, column, of_b) : b.get(batch, of_b, column)) : 0;
        __syncthreads();
        for (int i = 0; i < TILE; i++) {
            sum += left[threadIdx.x][i] * right[i][threadIdx.y];
        }
        __syncthreads();
    }
    if (row < m && column < n) {
        c.set(batch, row, column, alpha * sum + (beta == 0 ? 0 : beta * c.get(batch, row, column)));
    }
}

// X A = alpha * B with an upper triangular A, from the first column to the last; a thread for each row of B.
__global__ void solve(int m, int n, float alpha, const float * const * a, int lda, float * const * b, int ldb) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= m) {
        return;
    }
    const float * from = a[blockIdx.y];
    float * x = b[blockIdx.y];
    for (int column = 0; column < n; column++) {
        float sum = alpha * x[row + (long long) column * ldb];
        for (int i = 0; i < column; i++) {
            sum -= x[row + (long long) i * ldb] * from[i + (long long) column * lda];
        }
        x[row + (long long) column * ldb] = sum / from[column + (long long) column * lda];
    }
}

cublasStatus_t after_launch() {
    return cudaPeekAtLastError() == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

bool is_known(cudaDataType type) { return type == CUDA_R_32F || type == CUDA_R_16F || type == CUDA_R_16BF; }

cublasStatus_t gemm(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, float alpha,
                    Matrix a, Matrix b, float beta, Matrix c, int count) {
    if (!is_known(a.type) || !is_known(b.type) || !is_known(c.type) || count > 65535 || n > 65535 * TILE) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (m == 0 || n == 0 || count == 0) {
        return CUBLAS_STATUS_SUCCESS;
    }
    const dim3 blocks((m + TILE - 1) / TILE, (n + TILE - 1) / TILE, count);
    multiply<<<blocks, dim3(TILE, TILE), 0, ((Handle *) handle)->stream>>>(
        ta != CUBLAS_OP_N, tb != CUBLAS_OP_N, m, n, k, alpha, a, b, beta, c);
    return after_launch();
}

// The factors are of the type that is computed with.
float factor(const void * value, cublasComputeType_t type) {
    return type == CUBLAS_COMPUTE_16F ? __half2float(*(const __half *) value) : *(const float *) value;
}

} // namespace

#define STATUS extern "C" cublasStatus_t CUBLASWINAPI

STATUS cublasCreate_v2(cublasHandle_t * handle) {
    *handle = (cublasHandle_t) new Handle;
    return CUBLAS_STATUS_SUCCESS;
}
STATUS cublasDestroy_v2(cublasHandle_t handle) {
    delete (Handle *) handle;
    return CUBLAS_STATUS_SUCCESS;
}
STATUS cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    ((Handle *) handle)->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
STATUS cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
STATUS cublasSetWorkspace_v2(cublasHandle_t, void *, size_t) { return CUBLAS_STATUS_SUCCESS; }

extern "C" const char * CUBLASWINAPI cublasGetStatusString(cublasStatus_t status) {
    return status == CUBLAS_STATUS_NOT_SUPPORTED ? "the stand-in for cuBLAS cannot do this; install cuBLAS 13"
                                                 : "a kernel of the stand-in for cuBLAS could not be started";
}

STATUS cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                    const void * alpha, const void * a, cudaDataType ta_, int lda, const void * b, cudaDataType tb_, int ldb,
                    const void * beta, void * c, cudaDataType tc_, int ldc, cublasComputeType_t type, cublasGemmAlgo_t) {
    return gemm(handle, ta, tb, m, n, k, factor(alpha, type), {a, nullptr, 0, lda, ta_}, {b, nullptr, 0, ldb, tb_},
                factor(beta, type), {c, nullptr, 0, ldc, tc_}, 1);
}

STATUS cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                  const void * alpha, const void * a, cudaDataType ta_, int lda, long long sa,
                                  const void * b, cudaDataType tb_, int ldb, long long sb, const void * beta, void * c,
                                  cudaDataType tc_, int ldc, long long sc, int count, cublasComputeType_t type,
                                  cublasGemmAlgo_t) {
    return gemm(handle, ta, tb, m, n, k, factor(alpha, type), {a, nullptr, sa, lda, ta_}, {b, nullptr, sb, ldb, tb_},
                factor(beta, type), {c, nullptr, sc, ldc, tc_}, count);
}

STATUS cublasGemmBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                           const void * alpha, const void * const a[], cudaDataType ta_, int lda, const void * const b[],
                           cudaDataType tb_, int ldb, const void * beta, void * const c[], cudaDataType tc_, int ldc,
                           int count, cublasComputeType_t type, cublasGemmAlgo_t) {
    return gemm(handle, ta, tb, m, n, k, factor(alpha, type), {nullptr, a, 0, lda, ta_}, {nullptr, b, 0, ldb, tb_},
                factor(beta, type), {nullptr, c, 0, ldc, tc_}, count);
}

STATUS cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                      const float * alpha, const float * a, int lda, const float * b, int ldb, const float * beta, float * c,
                      int ldc) {
    return cublasGemmEx(handle, ta, tb, m, n, k, alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb, beta, c, CUDA_R_32F, ldc,
                        CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

STATUS cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                 const float * alpha, const float * a, int lda, long long sa, const float * b, int ldb,
                                 long long sb, const float * beta, float * c, int ldc, long long sc, int count) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, CUDA_R_32F, lda, sa, b, CUDA_R_32F, ldb, sb, beta, c,
                                      CUDA_R_32F, ldc, sc, count, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

STATUS cublasSgemmBatched(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                          const float * alpha, const float * const a[], int lda, const float * const b[], int ldb,
                          const float * beta, float * const c[], int ldc, int count) {
    return gemm(handle, ta, tb, m, n, k, *alpha, {nullptr, (const void * const *) a, 0, lda, CUDA_R_32F},
                {nullptr, (const void * const *) b, 0, ldb, CUDA_R_32F}, *beta,
                {nullptr, (const void * const *) c, 0, ldc, CUDA_R_32F}, count);
}

STATUS cublasStrsmBatched(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo, cublasOperation_t trans,
                          cublasDiagType_t diag, int m, int n, const float * alpha, const float * const a[], int lda,
                          float * const b[], int ldb, int count) {
    // As llama.cpp calls it, and in no other way.
    if (side != CUBLAS_SIDE_RIGHT || uplo != CUBLAS_FILL_MODE_UPPER || trans != CUBLAS_OP_N ||
        diag != CUBLAS_DIAG_NON_UNIT || count > 65535) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (m > 0 && n > 0 && count > 0) {
        solve<<<dim3((m + 255) / 256, count), 256, 0, ((Handle *) handle)->stream>>>(m, n, *alpha, a, lda, b, ldb);
    }
    return after_launch();
}
