/*
 * The nine C symbols that TensorRT's Python bindings link to, so that the module can be imported (and its
 * signatures read, its enums and callback classes used) where libnvinfer is not installed.
 *
 * Compile once per library with -DROADWORTHY_NVINFER, -DROADWORTHY_PLUGIN or -DROADWORTHY_PARSER.  Every
 * factory answers NULL; pybind11 turns that into an exception, so nothing can be built or run by accident.
 */
#include <stddef.h>
#include <stdbool.h>

#if defined(ROADWORTHY_NVINFER)
void *createInferBuilder_INTERNAL(void *logger, int version) { (void)logger; (void)version; return NULL; }
void *createInferRuntime_INTERNAL(void *logger, int version) { (void)logger; (void)version; return NULL; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version)
{
    (void)engine; (void)logger; (void)version;
    return NULL;
}
void *getBuilderPluginRegistry(int capability) { (void)capability; return NULL; }
void *getPluginRegistry(void) { return NULL; }
#elif defined(ROADWORTHY_PLUGIN)
bool initLibNvInferPlugins(void *logger, const char *name) { (void)logger; (void)name; return false; }
#elif defined(ROADWORTHY_PARSER)
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version)
{
    (void)network; (void)logger; (void)version;
    return NULL;
}
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version)
{
    (void)refitter; (void)logger; (void)version;
    return NULL;
}
int getNvOnnxParserVersion(void) { return 0; }
#else
#error "define one of ROADWORTHY_NVINFER, ROADWORTHY_PLUGIN, ROADWORTHY_PARSER"
#endif
