import Foundation
import Phi3CoreML

/// Everything that loading asks of a bundle whose hashes are right, but for its weights.
package enum BundleCheck {
    /// Compares manifest, tokenizer and functions, and tries the tokenizer on the bundle's test cases.
    ///
    /// - Parameter bundle: an opened bundle.
    /// - Returns: how many test cases were computed.
    /// - Throws: `Phi3Error`: what `Phi3.load` throws for this bundle, with either backend.
    package static func run(_ bundle: ModelBundle) throws -> Int {
        let cases = try TokenizerCheck.load(bundle, verify: true).cases
        _ = try ModelConfig(bundle.manifest, place: bundle.place(Manifest.fileName).path)
        try PackageContract.check(bundle)
        return cases
    }
}
