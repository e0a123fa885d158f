#if canImport(ObjectiveC)
    import ObjectiveC
#endif

/// Runs some work and frees what Apple's frameworks left to be freed later: a long prompt is one
/// piece of work for the queue, of many predictions.
func pooled<Result>(_ body: () throws -> Result) rethrows -> Result {
    #if canImport(ObjectiveC)
        try autoreleasepool(invoking: body)
    #else
        try body()
    #endif
}
