import Foundation
import MedPhiKit

/// Reading what the verbs are given.
enum Reading {
    /// The bytes of a file, or of standard input for `-`.
    static func bytes(_ path: String, _ console: Console) throws -> Data {
        guard path == "-" else {
            let url = URL(fileURLWithPath: path)
            try checkSize(FileBytes.size(of: url), path, limit: limit)
            return try FileBytes.read(url, limit: limit)
        }
        do {
            let data = try console.input()
            try checkSize(data.count, "standard input", limit: limit)
            return data
        } catch let error as Phi3Error {
            throw error
        } catch let error as CancellationError {
            throw error
        } catch {
            throw Streams.unreadable(error.localizedDescription)
        }
    }

    /// Bytes of the largest text that is read, 64 MiB.
    static let limit = 64 << 20

    /// Refuses a text that is too large.
    static func checkSize(_ bytes: Int, _ place: String, limit: Int) throws {
        guard bytes > limit else { return }
        throw Phi3Error.input(
            ErrorDetails(
                place: place, found: "more than \(Console.size(limit)) of text",
                expected: "at most \(limit) bytes", advice: "Give the text of one conversation."))
    }

    /// Waits for long work that never looks whether it was cancelled; then it is left behind.
    ///
    /// - Throws: what the work throws, or `CancellationError` at once.
    static func stoppable<Value: Sendable>(
        _ work: @escaping @Sendable () throws -> Value
    ) async throws -> Value {
        let (values, feed) = AsyncThrowingStream<Value, any Error>.makeStream()
        Thread.detachNewThread {
            do {
                feed.yield(try work())
                feed.finish()
            } catch {
                feed.finish(throwing: error)
            }
        }
        for try await value in values { return value }
        throw CancellationError()
    }

    /// A conversation; what is wrong with it is said with its line.
    static func conversation(_ text: String, _ place: String) throws -> Conversation {
        do {
            return try Conversation(text: text)
        } catch {
            var details = error.details
            let lines = text.split(omittingEmptySubsequences: false, whereSeparator: \.isNewline)
            let line = lines.firstIndex { (try? Conversation(text: String($0))) == nil }
            details.place = place + (line.map { ", line \($0 + 1)" } ?? "")
            throw Phi3Error.input(details)
        }
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
        let kind = FileBytes.kind(of: url)
        if kind == .missing {
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
        guard kind == .folder || (kind == .file && url.pathExtension == "safetensors") else {
            throw Phi3Error.file(
                ErrorDetails(
                    place: url.path, found: "is not a .safetensors file and no folder",
                    expected: "a bundle, a checkpoint, or a folder with tokenizer.json",
                    advice: "Give the folder of the model."))
        }
        let folder = kind == .folder ? url : url.deletingLastPathComponent()
        return try Tokenizer.load(directory: folder)
    }

    /// The model with the adapter that was typed, if any.
    static func adapted(_ model: Phi3, _ arguments: Arguments) async throws -> Phi3 {
        guard let adapter = arguments.text("adapter") else { return model }
        let url = URL(fileURLWithPath: adapter)
        if !model.adapters.contains(adapter), FileBytes.kind(of: url) == .other {
            throw Phi3Error.file(
                ErrorDetails(
                    place: adapter, found: "exists, but is no file or folder",
                    expected: "the file or folder of an adapter, or a name in the bundle",
                    advice: "Check the path."))
        }
        return try await model.applyLoRA(.named(adapter))
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
