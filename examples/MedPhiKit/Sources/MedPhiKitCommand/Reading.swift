import Foundation
import MedPhiKit

/// Reading what the verbs are given.
enum Reading {
    /// The bytes of a file, or of standard input for `-`.
    static func bytes(_ path: String, _ console: Console) throws -> Data {
        if path == "-" {
            do {
                return try console.input()
            } catch {
                throw Phi3Error.file(
                    ErrorDetails(
                        place: "-", found: "standard input cannot be read",
                        expected: "text on standard input", advice: "Name a file instead."))
            }
        }
        return try FileBytes.read(URL(fileURLWithPath: path), limit: 64 << 20)
    }

    /// Text in UTF-8; a mark at its beginning that some editors leave is no part of it.
    static func text(_ data: Data, _ place: String) throws -> String {
        guard var text = String(validating: data, as: UTF8.self) else {
            throw Phi3Error.input(
                ErrorDetails(
                    place: place, found: "bytes that are not UTF-8", expected: "text in UTF-8",
                    advice: "Save the file again as UTF-8."))
        }
        if text.unicodeScalars.first == "\u{FEFF}" { text.unicodeScalars.removeFirst() }
        return text
    }

    /// Whether a place is a bundle.
    static func isBundle(_ url: URL) -> Bool {
        url.pathExtension == "medphi"
            || FileBytes.kind(of: url.appendingPathComponent(Manifest.fileName)) == .file
    }

    /// The tokenizer of a bundle, a checkpoint, or a folder with its files.
    static func tokenizer(_ url: URL) throws -> Tokenizer {
        if FileBytes.kind(of: url) == .missing {
            throw Phi3Error.file(
                ErrorDetails(
                    place: url.path, found: "nothing there",
                    expected: "a bundle, a checkpoint, or a folder with tokenizer.json",
                    advice: "Check the path."))
        }
        if isBundle(url) {
            return try Tokenizer.load(
                directory: ModelBundle.open(url, check: false).tokenizerFolder)
        }
        let isFolder = FileBytes.kind(of: url) == .folder
        return try Tokenizer.load(directory: isFolder ? url : url.deletingLastPathComponent())
    }

    /// Loads a model and says on standard error what goes on.
    static func model(
        _ url: URL, _ arguments: Arguments, _ console: Console, options: LoadOptions = .init()
    ) async throws -> Phi3 {
        let last = LastLine()
        return try await Phi3.load(url, backend: arguments.backend(), options: options) { event in
            guard let line = line(event), last.isNew(line) else { return }
            console.note(line)
        }
    }

    private static func line(_ event: LoadEvent) -> String? {
        switch event {
        case .verifying: "checking files …"
        case .compiling: "compiling for this device …"
        case .specializing: "fitting to the compute units; the first time takes long …"
        case .loading: "reading weights …"
        case .ready: nil
        }
    }
}
