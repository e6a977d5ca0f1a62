// Reads a buffer far larger than any cache with N threads, each its own part, and prints GB/s (10^9 bytes) of every
// pass. A pass does nothing with the data but add it up: no program that reads its weights once a token can be faster.
// A pass lasts from the first thread's start to the last one's end, as the threads themselves see it: a thread that
// only waits for them may wake up late.
//
//     bandwidth THREADS BYTES PASSES

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LANES = 32 };

typedef struct {
    const uint64_t *begin;
    size_t words;
    int passes;
    pthread_barrier_t *barrier;
    double *begins, *ends;
    uint64_t sum;
} Part;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static uint64_t sum_of(const uint64_t *words, size_t count) {
    uint64_t lanes[LANES] = {0}, sum = 0;
    for (size_t i = 0; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] += words[i + lane];
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

static void *run(void *argument) {
    Part *part = argument;
    memset((void *)part->begin, 1, part->words * sizeof(uint64_t));
    for (int pass = 0; pass < part->passes; pass++) {
        pthread_barrier_wait(part->barrier);
        part->begins[pass] = now();
        part->sum += sum_of(part->begin, part->words);
        part->ends[pass] = now();
    }
    return NULL;
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    int threads = atoi(arguments[1]), passes = atoi(arguments[3]);
    size_t words = strtoull(arguments[2], NULL, 10) / sizeof(uint64_t) / threads;
    uint64_t *buffer = NULL, sum = 0;
    if (posix_memalign((void **)&buffer, 4096, words * threads * sizeof(uint64_t))) return 3;
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, threads);
    Part *parts = calloc(threads, sizeof(Part));
    pthread_t *handles = calloc(threads, sizeof(pthread_t));
    for (int i = 0; i < threads; i++) {
        double *times = calloc(2 * passes, sizeof(double));
        parts[i] = (Part){buffer + i * words, words, passes, &barrier, times, times + passes, 0};
        pthread_create(&handles[i], NULL, run, &parts[i]);
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(handles[i], NULL);
        sum += parts[i].sum;
    }
    for (int pass = 0; pass < passes; pass++) {
        double begin = parts[0].begins[pass], end = parts[0].ends[pass];
        for (int i = 1; i < threads; i++) {
            if (parts[i].begins[pass] < begin) begin = parts[i].begins[pass];
            if (parts[i].ends[pass] > end) end = parts[i].ends[pass];
        }
        printf("%.3f\n", words * threads * sizeof(uint64_t) / (end - begin) / 1e9);
    }
    fprintf(stderr, "%llu\n", (unsigned long long)sum);  // what is used cannot be optimized away
    return 0;
}
