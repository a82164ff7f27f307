/* The part of ONNX Runtime's C API that is used here, declared by hand.
 *
 * ONNX Runtime hands out one table of function pointers whose order never changes (it is append-only, guarded upstream by static
 * assertions), so a function is its number in that table. No header of ONNX Runtime is needed to build, and nothing is linked: the
 * shared library is opened at run time, from the path that Python found. */
#ifndef VLM_ORT_API_H
#define VLM_ORT_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define ORT_CALL __stdcall
typedef wchar_t OrtPathChar;
#else
#define ORT_CALL
typedef char OrtPathChar;
#endif

/* The version of the table that is asked for: of ONNX Runtime 1.17. Everything used is older; newer libraries still serve it. */
#define ORT_API_VERSION_WANTED 17

typedef struct OrtStatus OrtStatus;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtThreadingOptions OrtThreadingOptions;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtValue OrtValue;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtTensorInfo OrtTensorInfo; /* upstream: OrtTensorTypeAndShapeInfo */
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtIoBinding OrtIoBinding;
typedef struct OrtCudaOptions OrtCudaOptions;       /* upstream: OrtCUDAProviderOptionsV2 */
typedef struct OrtSubgraph OrtSubgraph;             /* upstream: OrtEpAssignedSubgraph */
typedef struct OrtAssignedNode OrtAssignedNode;     /* upstream: OrtEpAssignedNode */

enum { ORT_INVALID_ARGUMENT = 2, ORT_LOG_FATAL = 4, ORT_ALLOCATOR_DEVICE = 0, ORT_MEMORY_DEFAULT = 0 };

/* X(slot, name, return type, parameters) */
#define ORT_FUNCTIONS(X)                                                                                                             \
    X(0, CreateStatus, OrtStatus *, (int code, const char *message))                                                                 \
    X(2, GetErrorMessage, const char *, (const OrtStatus *status))                                                                   \
    X(3, CreateEnv, OrtStatus *, (int log_level, const char *name, OrtEnv **out))                                                    \
    X(7, CreateSession, OrtStatus *, (const OrtEnv *env, const OrtPathChar *path, const OrtSessionOptions *options, OrtSession **out)) \
    X(8, CreateSessionFromArray, OrtStatus *,                                                                                        \
      (const OrtEnv *env, const void *model, size_t bytes, const OrtSessionOptions *options, OrtSession **out))                      \
    X(9, Run, OrtStatus *,                                                                                                           \
      (OrtSession * session, const OrtRunOptions *options, const char *const *input_names, const OrtValue *const *inputs,            \
       size_t input_count, const char *const *output_names, size_t output_count, OrtValue **outputs))                                \
    X(10, CreateSessionOptions, OrtStatus *, (OrtSessionOptions * *out))                                                             \
    X(21, SetSessionLogVerbosityLevel, OrtStatus *, (OrtSessionOptions * options, int level))                                        \
    X(22, SetSessionLogSeverityLevel, OrtStatus *, (OrtSessionOptions * options, int level))                                         \
    X(23, SetSessionGraphOptimizationLevel, OrtStatus *, (OrtSessionOptions * options, int level))                                   \
    X(24, SetIntraOpNumThreads, OrtStatus *, (OrtSessionOptions * options, int threads))                                             \
    X(30, SessionGetInputCount, OrtStatus *, (const OrtSession *session, size_t *out))                                               \
    X(31, SessionGetOutputCount, OrtStatus *, (const OrtSession *session, size_t *out))                                              \
    X(33, SessionGetInputTypeInfo, OrtStatus *, (const OrtSession *session, size_t index, OrtTypeInfo **out))                        \
    X(34, SessionGetOutputTypeInfo, OrtStatus *, (const OrtSession *session, size_t index, OrtTypeInfo **out))                       \
    X(36, SessionGetInputName, OrtStatus *, (const OrtSession *session, size_t index, OrtAllocator *allocator, char **out))          \
    X(37, SessionGetOutputName, OrtStatus *, (const OrtSession *session, size_t index, OrtAllocator *allocator, char **out))         \
    X(39, CreateRunOptions, OrtStatus *, (OrtRunOptions * *out))                                                                     \
    X(41, RunOptionsSetRunLogSeverityLevel, OrtStatus *, (OrtRunOptions * options, int level))                                       \
    X(49, CreateTensorWithDataAsOrtValue, OrtStatus *,                                                                               \
      (const OrtMemoryInfo *info, void *data, size_t bytes, const int64_t *shape, size_t rank, int type, OrtValue **out))            \
    X(50, IsTensor, OrtStatus *, (const OrtValue *value, int *out))                                                                  \
    X(51, GetTensorMutableData, OrtStatus *, (OrtValue * value, void **out))                                                         \
    X(55, CastTypeInfoToTensorInfo, OrtStatus *, (const OrtTypeInfo *info, const OrtTensorInfo **out))                               \
    X(60, GetTensorElementType, OrtStatus *, (const OrtTensorInfo *info, int *out))                                                  \
    X(61, GetDimensionsCount, OrtStatus *, (const OrtTensorInfo *info, size_t *out))                                                 \
    X(62, GetDimensions, OrtStatus *, (const OrtTensorInfo *info, int64_t *dims, size_t count))                                      \
    X(63, GetSymbolicDimensions, OrtStatus *, (const OrtTensorInfo *info, const char **names, size_t count))                         \
    X(65, GetTensorTypeAndShape, OrtStatus *, (const OrtValue *value, OrtTensorInfo **out))                                          \
    X(68, CreateMemoryInfo, OrtStatus *, (const char *name, int allocator, int id, int memory, OrtMemoryInfo **out))                 \
    X(69, CreateCpuMemoryInfo, OrtStatus *, (int allocator, int memory, OrtMemoryInfo **out))                                        \
    X(76, AllocatorFree, OrtStatus *, (OrtAllocator * allocator, void *memory))                                                      \
    X(78, GetAllocatorWithDefaultOptions, OrtStatus *, (OrtAllocator * *out))                                                        \
    X(92, ReleaseEnv, void, (OrtEnv * env))                                                                                          \
    X(93, ReleaseStatus, void, (OrtStatus * status))                                                                                 \
    X(94, ReleaseMemoryInfo, void, (OrtMemoryInfo * info))                                                                           \
    X(95, ReleaseSession, void, (OrtSession * session))                                                                              \
    X(96, ReleaseValue, void, (OrtValue * value))                                                                                    \
    X(97, ReleaseRunOptions, void, (OrtRunOptions * options))                                                                        \
    X(98, ReleaseTypeInfo, void, (OrtTypeInfo * info))                                                                               \
    X(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorInfo * info))                                                               \
    X(100, ReleaseSessionOptions, void, (OrtSessionOptions * options))                                                               \
    X(119, CreateEnvWithGlobalThreadPools, OrtStatus *,                                                                              \
      (int log_level, const char *name, const OrtThreadingOptions *options, OrtEnv **out))                                           \
    X(120, DisablePerSessionThreads, OrtStatus *, (OrtSessionOptions * options))                                                     \
    X(121, CreateThreadingOptions, OrtStatus *, (OrtThreadingOptions * *out))                                                        \
    X(122, ReleaseThreadingOptions, void, (OrtThreadingOptions * options))                                                           \
    X(130, AddSessionConfigEntry, OrtStatus *, (OrtSessionOptions * options, const char *key, const char *value))                    \
    X(133, RunWithBinding, OrtStatus *, (OrtSession * session, const OrtRunOptions *options, const OrtIoBinding *binding))           \
    X(134, CreateIoBinding, OrtStatus *, (OrtSession * session, OrtIoBinding * *out))                                                \
    X(135, ReleaseIoBinding, void, (OrtIoBinding * binding))                                                                         \
    X(136, BindInput, OrtStatus *, (OrtIoBinding * binding, const char *name, const OrtValue *value))                                \
    X(137, BindOutput, OrtStatus *, (OrtIoBinding * binding, const char *name, const OrtValue *value))                               \
    X(147, SetGlobalIntraOpNumThreads, OrtStatus *, (OrtThreadingOptions * options, int threads))                                    \
    X(148, SetGlobalInterOpNumThreads, OrtStatus *, (OrtThreadingOptions * options, int threads))                                    \
    X(149, SetGlobalSpinControl, OrtStatus *, (OrtThreadingOptions * options, int allow))                                            \
    X(165, AddRunConfigEntry, OrtStatus *, (OrtRunOptions * options, const char *key, const char *value))                            \
    X(204, SessionOptionsAppendExecutionProvider_CUDA_V2, OrtStatus *, (OrtSessionOptions * options, const OrtCudaOptions *cuda))    \
    X(205, CreateCUDAProviderOptions, OrtStatus *, (OrtCudaOptions * *out))                                                          \
    X(206, UpdateCUDAProviderOptions, OrtStatus *,                                                                                   \
      (OrtCudaOptions * options, const char *const *keys, const char *const *values, size_t count))                                  \
    X(208, ReleaseCUDAProviderOptions, void, (OrtCudaOptions * options))                                                             \
    X(263, UpdateCUDAProviderOptionsWithValue, OrtStatus *, (OrtCudaOptions * options, const char *key, void *value))

#define ORT_MEMBER(slot, name, result, parameters) result(ORT_CALL *name) parameters;
typedef struct {
    ORT_FUNCTIONS(ORT_MEMBER)
} OrtFunctions;

/* Filled by ort_load; every pointer is valid once it succeeded. */
extern OrtFunctions ort;

/* What ONNX Runtime 1.24 added to say which provider runs which node of a session that was made with
 * `session.record_ep_graph_assignment_info`. */
#define ORT_PLACEMENT_VERSION 24
#define ORT_PLACEMENT_FUNCTIONS(X)                                                                                                   \
    X(407, Session_GetEpGraphAssignmentInfo, OrtStatus *,                                                                            \
      (const OrtSession *session, const OrtSubgraph *const **out, size_t *count))                                                    \
    X(408, EpAssignedSubgraph_GetEpName, OrtStatus *, (const OrtSubgraph *subgraph, const char **out))                               \
    X(409, EpAssignedSubgraph_GetNodes, OrtStatus *, (const OrtSubgraph *subgraph, const OrtAssignedNode *const **out, size_t *count)) \
    X(410, EpAssignedNode_GetName, OrtStatus *, (const OrtAssignedNode *node, const char **out))                                     \
    X(412, EpAssignedNode_GetOperatorType, OrtStatus *, (const OrtAssignedNode *node, const char **out))

typedef struct {
    ORT_PLACEMENT_FUNCTIONS(ORT_MEMBER)
} OrtPlacementFunctions;

/* NULL where the library is older. */
const OrtPlacementFunctions *ort_placement(void);

#define ORT_MESSAGE_SIZE 1024

/* Opens the library and fills `ort`. A second call returns at once. −1 with the reason in `message`. */
int ort_load(const char *path, char message[ORT_MESSAGE_SIZE]);
/* The opened library's version, or NULL. */
const char *ort_version(void);

/* Releases `status` and puts its text into `message`; 0 when it was NULL (success), −1 otherwise. */
int ort_check(OrtStatus *status, char message[ORT_MESSAGE_SIZE]);

/* A tensor over memory of the caller's, which must outlive the value. */
OrtStatus *ort_wrap(void *data, size_t bytes, const int64_t *shape, size_t rank, int type, OrtValue **out);

/* The process-wide environment, created by the first caller with one thread pool of `threads` threads for all sessions, and freed
 * with its last user. *shared says whether the pool is as asked for; where it is not, the session needs its own. */
int ort_env_acquire(int threads, bool spin, OrtEnv **env, bool *shared, char message[ORT_MESSAGE_SIZE]);
void ort_env_release(void);

#endif
