/* Replays recorded calls of the C kernels: replay.py writes them to standard input and compares standard output.
 *
 * A call is the number of its function, NUMBERS integers, and BUFFERS buffers, the first of which is the output. A
 * buffer is its size in bytes, or -1 for NULL, its distance from an aligned address, and its bytes. Integers have 64
 * bits and this processor's byte order. After each call its whole output is written, and a number that is 0 if the
 * function has returned 0 and has written to no byte on either side of the output. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

#include "entry_points.h"

#define NUMBERS 9
#define BUFFERS 8
#define MARGIN 64 /* so many bytes on each side of a buffer */

enum { ROWS, ROW, GROUPS, FUSED, STRATIFIED, SELECT, PHILOX }; /* replay.py has the same numbers */

static int64_t read_number(void) {
    int64_t number;
    if (fread(&number, sizeof number, 1, stdin) != 1) exit(2);
    return number;
}

int main(void) {
    int64_t function;
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    while (fread(&function, sizeof function, 1, stdin) == 1) {
        int64_t n[NUMBERS], sizes[BUFFERS], result = 0;
        char *memory[BUFFERS];
        void *b[BUFFERS];
        for (int i = 0; i < NUMBERS; i++) n[i] = read_number();
        for (int i = 0; i < BUFFERS; i++) {
            sizes[i] = read_number();
            const int64_t distance = read_number();
            if ((memory[i] = malloc((size_t)(sizes[i] + distance + 2 * MARGIN))) == NULL) return 2;
            b[i] = sizes[i] < 0 ? NULL : memory[i] + MARGIN + distance;
            memset(memory[i], MARGIN, (size_t)(sizes[i] + distance + 2 * MARGIN));
            if (sizes[i] > 0 && fread(b[i], (size_t)sizes[i], 1, stdin) != 1) return 2;
        }
        switch (function) {
        case ROWS:
            td_rows((int)n[0], (int)n[1], b[0], b[1], n[2], n[3], n[4], (uint64_t)n[5], n[6], b[2], b[3], n[7],
                    (int)n[8], -1);
            break;
        case ROW: td_row((int)n[0], (int)n[1], b[0], b[1], n[2], b[2], b[3], (int)n[3]); break;
        case GROUPS: td_groups((int)n[0], b[0], b[1], n[1], n[2], b[2], b[3], (int)n[3]); break;
        case FUSED:
            td_fused((int)n[0], (int)n[1], b[0], b[1], b[4], n[2], b[5], n[3], b[2], b[3], (int)n[4], -1);
            break;
        case STRATIFIED: td_stratified(b[0], n[0], n[1], n[2], b[1], b[2], b[4], n[3], b[3], (int)n[4], -1); break;
        case SELECT:
            result = td_select((int)n[0], b[0], b[1], b[2], (int)n[1], b[4], b[5], b[6], b[7], b[3], (int)n[2], -1);
            break;
        case PHILOX: td_philox_block((uint64_t)n[0], b[1], b[0]); break;
        default: return 2;
        }
        const char *begin = b[0], *end = begin + sizes[0];
        for (int i = 0; i < MARGIN; i++) result |= begin[-1 - i] != MARGIN || end[i] != MARGIN;
        if (sizes[0] > 0 && fwrite(b[0], (size_t)sizes[0], 1, stdout) != 1) return 2;
        if (fwrite(&result, sizeof result, 1, stdout) != 1) return 2;
        for (int i = 0; i < BUFFERS; i++) free(memory[i]);
    }
    fprintf(stderr, "width %d, OpenMP %d\n", td_width(), td_openmp());
    return 0;
}
