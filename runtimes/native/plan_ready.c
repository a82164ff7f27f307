/* What a call must bring along before it runs: positions that the tables have, static keys and masks of one length. */
#include "plan.h"

#include <stdarg.h>
#include <stdio.h>

static int fail(char message[PLAN_MESSAGE_SIZE], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, PLAN_MESSAGE_SIZE, format, arguments);
    va_end(arguments);
    return -1;
}

/* A step's table of positions (or of entries' indices): how many it has from 0 on. */
typedef struct {
    bool reads, by_index;
    int64_t least, count, rows;
} Table;

static Table table_of(const Plan *plan, const PlanStep *step) {
    const bool lookup = step->kind == STEP_LOOKUP, rotary = step->kind == STEP_ROTARY && (step->arg[7] == 1 || step->arg[7] == 2);
    const int64_t shift = lookup ? step->arg[0] : 0, rows = lookup || rotary ? (int64_t)plan->weights[step->weight[0]].matrix.depth : 0;
    return (Table){.reads = lookup || rotary, .by_index = lookup ? step->arg[1] != 0 : step->arg[7] == 2, .least = -shift, .count = rows - shift, .rows = rows};
}

size_t plan_room(const Plan *plan, int64_t position, int64_t index) {
    int64_t room = INT32_MAX;
    for (uint32_t i = 0; i < plan->step_count; i++) {
        const Table table = table_of(plan, &plan->steps[i]);
        const int64_t left = table.count - (table.by_index ? index : position);
        room = table.reads && left < room ? left : room;
    }
    return room > 0 ? (size_t)room : 0;
}

/* Tables are read at the tokens' positions or at their entries' indices: all of them must be there. */
static int check_positions(const Plan *plan, const PlanRun *run, char message[PLAN_MESSAGE_SIZE]) {
    int64_t least[2] = {INT64_MAX, INT64_MAX}, most[2] = {INT64_MIN, INT64_MIN}; /* of positions, of indices */
    for (size_t k = 0; run->positions != NULL && k < run->rows * run->tokens; k++) {
        least[0] = run->positions[k] < least[0] ? run->positions[k] : least[0];
        most[0] = run->positions[k] > most[0] ? run->positions[k] : most[0];
    }
    for (size_t row = 0; row < run->rows; row++) {
        const int64_t newest = run->seqlens[row], oldest = newest + 1 - (int64_t)run->tokens;
        least[1] = oldest < least[1] ? oldest : least[1];
        most[1] = newest > most[1] ? newest : most[1];
    }
    for (uint32_t i = 0; i < plan->step_count; i++) {
        const Table table = table_of(plan, &plan->steps[i]);
        if (table.reads && (least[table.by_index] < table.least || most[table.by_index] >= table.count)) {
            const int64_t wrong = least[table.by_index] < table.least ? least[table.by_index] : most[table.by_index];
            return fail(message, "position %lld is outside the table of %lld", (long long)wrong, (long long)table.rows);
        }
    }
    return 0;
}

/* Keys, values and masks that belong together have as many entries each. */
static int check_static(const Plan *plan, const PlanRun *run, char message[PLAN_MESSAGE_SIZE]) {
    for (uint32_t i = 0; i < plan->step_count; i++) {
        const PlanStep *step = &plan->steps[i];
        if (step->kind == STEP_CROSS) {
            const size_t entries = run->input_sizes[step->arg[0]];
            if (run->input_sizes[step->arg[1]] != entries || (step->arg[5] >= 0 && run->input_sizes[step->arg[5]] != entries)) {
                return fail(message, "static keys, values and their mask have unlike lengths");
            }
            const size_t cells = step->arg[6] >= 0 ? run->input_sizes[step->arg[6]] : 1;
            if (entries > 0 && (cells == 0 || entries % cells != 0)) {
                return fail(message, "%zu static keys are not those of %zu images", entries, cells);
            }
        }
    }
    return 0;
}

int plan_ready(const Plan *plan, const PlanRun *run, char message[PLAN_MESSAGE_SIZE]) {
    return check_positions(plan, run, message) != 0 ? -1 : check_static(plan, run, message);
}
