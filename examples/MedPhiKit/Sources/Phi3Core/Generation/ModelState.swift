/// Something that happens while a model is loaded.
public enum LoadEvent: Sendable, Equatable {
    /// Hashes of the files are compared; bytes so far and in all.
    case verifying(done: Int, total: Int)
    /// The package is compiled for this device, once for each system version.
    case compiling
    /// The compiled package is fitted to the units it runs on; the first time takes long.
    case specializing
    /// Weights are read.
    case loading
    /// The model can be used.
    case ready
}

/// What a model is doing; see `Phi3.states()`.
public enum ModelState: Sendable, Equatable {
    /// Nothing is in memory; the next use loads it.
    case unloaded
    /// It is being loaded.
    case loading(LoadEvent)
    /// It waits for work.
    case ready
    /// It writes.
    case generating
    /// Loading or generating failed, and why.
    case failed(Phi3Error)
}
