/* What surrounds the engines in a decode step: inputs from the rows' state, and the rows' state after it.
 *
 * All rows run in every step, since a captured graph has fixed shapes. A row that sits a step out writes its cache entry behind its
 * last valid one, which nobody reads; where there is none behind, `save_last` and `restore_last` put the last one back. */
#include "decode_layout.h"


DEVICE i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* One block. Decides which rows run, and writes token ids, past lengths and positions. */
KERNEL void vlm_begin(const Step *s) {
    SHARED i32 halted;
    Row *rows = ADDRESS(Row, s->rows);
    Control *control = ADDRESS(Control, s->control);
    if (THREAD == 0) {
        halted = control->halted;
        for (i32 i = 0; i < s->batch; i++) {
            halted |= (rows[i].active || rows[i].marked) && rows[i].pending >= 0 && rows[i].length >= s->capacity;
        }
        control->halted = halted;
        control->slot++;
    }
    __syncthreads();
    for (i32 i = (i32)THREAD; i < s->batch; i += (i32)THREADS) {
        Row *row = &rows[i];
        row->running = !halted && (row->active || row->marked) && row->pending >= 0;
        const i64 token = row->running ? row->pending : 0, position = row->running ? row->position : 0;
        if (s->wide_ids) {
            ADDRESS(i64, s->ids)[i] = token;
        } else {
            ADDRESS(i32, s->ids)[i] = (i32)token;
        }
        if (s->past != 0) {
            ADDRESS(i32, s->past)[i] = (i32)least(row->length, s->bucket - 1);
        }
        for (i32 axis = 0; axis < s->axes; axis++) {
            if (s->wide_positions) {
                ADDRESS(i64, s->positions)[axis * s->batch + i] = position;
            } else {
                ADDRESS(i32, s->positions)[axis * s->batch + i] = (i32)position;
            }
        }
    }
}

/* A copy by a whole block, of words where everything is aligned to them. */
DEVICE void copy_bytes(i64 to, i64 from, i64 bytes) {
    if (((to | from | bytes) & 3) == 0) {
        for (i64 i = THREAD; i < bytes / 4; i += THREADS) {
            ADDRESS(u32, to)[i] = ADDRESS(u32, from)[i];
        }
    } else {
        for (i64 i = THREAD; i < bytes; i += THREADS) {
            ADDRESS(unsigned char, to)[i] = ADDRESS(unsigned char, from)[i];
        }
    }
}

/* Blocks: caches × rows. */
DEVICE void last_entries(const Step *s, bool restore) {
    const Row *row = ADDRESS(Row, s->rows) + blockIdx.y;
    const GuardedCache *cache = ADDRESS(GuardedCache, s->guarded) + blockIdx.x;
    if (row->running || row->length < s->bucket) {
        return;
    }
    const i64 first = (i64)blockIdx.y * cache->heads;
    for (i64 head = first; head < first + cache->heads; head++) {
        const i64 last = (head * s->bucket + s->bucket - 1) * cache->entry, saved = cache->save + head * cache->entry;
        if (restore) {
            copy_bytes(cache->present + last, saved, cache->entry);
        } else {
            copy_bytes(saved, cache->past + last, cache->entry);
        }
    }
}

KERNEL void vlm_save_last(const Step *s) { last_entries(s, false); }

KERNEL void vlm_restore_last(const Step *s) { last_entries(s, true); }

/* Blocks: any number × rows. Logits, recurrent states and further outputs of the rows that ran. */
KERNEL void vlm_keep(const Step *s) {
    if (!ADDRESS(Row, s->rows)[blockIdx.y].running) {
        return;
    }
    for (i32 i = 0; i < s->kept_count; i++) {
        const KeptTensor *tensor = ADDRESS(KeptTensor, s->kept) + i;
        /* A share of whole 64-byte lines for each block. */
        const i64 share = (tensor->bytes / gridDim.x + 64) & ~63LL, begin = least((i64)blockIdx.x * share, tensor->bytes);
        const i64 size = least(share, tensor->bytes - begin);
        copy_bytes(tensor->to + (i64)blockIdx.y * tensor->to_stride + begin, tensor->from + (i64)blockIdx.y * tensor->from_stride + begin,
                   size);
    }
}

/* One block. The tokens that ran are in the cache now. */
KERNEL void vlm_finish(const Step *s) {
    for (i32 i = (i32)THREAD; i < s->batch; i += (i32)THREADS) {
        Row *row = ADDRESS(Row, s->rows) + i;
        if (!row->running) {
            continue;
        }
        const i64 token = row->pending;
        if (row->history != 0) {
            ADDRESS(i32, row->history)[row->tokens] = (i32)token;
        }
        row->tokens++;
        if (row->seen != 0 && !ADDRESS(unsigned char, row->seen)[token]) {
            ADDRESS(unsigned char, row->seen)[token] = 1;
            ADDRESS(i32, row->seen_list)[row->seen_count++] = (i32)token;
        }
        row->length++;
        row->position++;
        row->pending = -1;
        row->running = 0;
    }
}
