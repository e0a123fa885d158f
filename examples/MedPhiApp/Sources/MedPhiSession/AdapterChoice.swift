import Foundation
import MedPhiKit

/// What can be put on the model.
public enum AdapterChoice: Sendable, Hashable, Identifiable {
    /// Nothing: the base itself.
    case base
    /// An adapter of the bundle.
    case named(String)
    /// A file or folder that a person opened.
    case file(URL)

    /// Itself.
    public var id: Self { self }

    /// What the menu says.
    public var title: String {
        switch self {
        case .base: "none (the base)"
        case .named(let name): name
        case .file(let url): url.deletingPathExtension().lastPathComponent
        }
    }

    /// The model with it on.
    func applied(to base: Phi3) async throws -> Phi3 {
        switch self {
        case .base: base.removingLoRA()
        case .named(let name): try await base.applyLoRA(.named(name))
        case .file(let url): try await base.applyLoRA(.file(url))
        }
    }
}
