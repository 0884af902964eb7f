// Whether this compiler's AMX code works; exits with 1 if it does not.
//
// GCC 12's _tile_loadconfig tells the optimiser that 8 of the 64 bytes of a configuration are read, so from -O2 on the
// stores to the others are gone, and the first tile instruction is an illegal one. llama.cpp configures its tiles in
// this way (ggml/src/ggml-cpu/amx/mmq.cpp).

#if defined(__AMX_INT8__) && defined(__linux__)

#include <cstdint>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

struct Configuration {
    uint8_t palette = 0;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {0};
    uint16_t row_bytes[16] = {0};
    uint8_t rows[16] = {0};
};

static void configure() {
    alignas(64) Configuration wanted;
    wanted.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
        wanted.rows[tile] = 16;
        wanted.row_bytes[tile] = 64;
    }
    _tile_loadconfig(&wanted);
}

int main() {
    const int request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data)) {
        return 0;  // llama.cpp asks for the same, and does without AMX then
    }
    configure();
    Configuration found;
    asm volatile("sttilecfg %0" : "=m"(found));
    return found.rows[7] == 16 && found.row_bytes[7] == 64 ? 0 : 1;
}

#else

int main() { return 0; }

#endif
