import Foundation

/// Keeps a file that a person picked readable for as long as this lives.
///
/// On Apple's systems a picked file or folder may be read only between two calls; a model's weights
/// are read as they are needed, so the access lasts as long as the model is open.
final class FileAccess: Sendable {
    let url: URL
    #if canImport(Darwin)
        private let granted: Bool
    #endif

    init(_ url: URL) {
        self.url = url
        #if canImport(Darwin)
            granted = url.startAccessingSecurityScopedResource()
        #endif
    }

    #if canImport(Darwin)
        deinit { if granted { url.stopAccessingSecurityScopedResource() } }
    #endif
}
