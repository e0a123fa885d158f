import Foundation

/// What went wrong, in the four parts every message has.
public struct ErrorDetails: Sendable, Equatable, CustomStringConvertible {
    /// The file, option or place the error is about.
    public var place: String
    /// What was found there. Never the words of a conversation or a note.
    public var found: String
    /// What was expected instead.
    public var expected: String
    /// What the reader of the message can do.
    public var advice: String

    /// Makes the four parts of a message.
    public init(place: String, found: String, expected: String, advice: String) {
        self.place = place
        self.found = found
        self.expected = expected
        self.advice = advice
    }

    /// The message on one line.
    public var description: String {
        "\(place): \(found). Expected \(expected). \(advice)"
    }
}

/// Every error this package throws. Its text says where, what was found, what was expected, and
/// what to do.
public enum Phi3Error: Error, LocalizedError, Sendable, Equatable, CustomStringConvertible {
    /// A file cannot be read or written.
    case file(ErrorDetails)
    /// A file is cut short, altered, or not of the form it says it has.
    case damagedFile(ErrorDetails)
    /// The files of a tokenizer are damaged or not of the Phi-3 family.
    case tokenizer(ErrorDetails)
    /// A chat template that this package cannot reproduce.
    case chatTemplate(ErrorDetails)
    /// The tokenizer gives other ids or text than the vectors that came with it.
    case tokenizerVectors(ErrorDetails)
    /// A conversation, message or section that cannot be written into a prompt.
    case input(ErrorDetails)
    /// An option outside its range.
    case option(ErrorDetails)
    /// Prompt and note together do not fit the context.
    case contextOverflow(ErrorDetails)
    /// The model gave logits that no token can be chosen from.
    case generation(ErrorDetails)
    /// A package that cannot be compiled, loaded or run.
    case modelLoad(ErrorDetails)
    /// A package whose functions are not what its manifest says.
    case schemaMismatch(ProblemList)
    /// The model needs more memory than there is.
    case insufficientMemory(ErrorDetails)
    /// A file could not be fetched.
    case download(ErrorDetails)
    /// The network was asked for where it is not allowed.
    case networkDisabled(ErrorDetails)

    /// A file of a later form than this package reads.
    case unsupportedSchema(ErrorDetails)
    /// A checkpoint that is no Phi-3, is incomplete, or does not fit its `config.json`.
    case checkpoint(ErrorDetails)
    /// A manifest whose keys are missing, of another kind, or in contradiction.
    case manifest(ProblemList)
    /// Files of a bundle that are altered, missing, not listed, or no plain files.
    case checksumMismatch(ProblemList)
    /// An adapter that is damaged or belongs to another model.
    case adapterIncompatible(ProblemList)

    /// The parts of the message.
    public var details: ErrorDetails {
        switch self {
        case .tokenizer(let details), .chatTemplate(let details), .tokenizerVectors(let details),
            .input(let details), .option(let details), .contextOverflow(let details),
            .generation(let details), .modelLoad(let details), .insufficientMemory(let details),
            .download(let details), .networkDisabled(let details),
            .file(let details), .damagedFile(let details), .unsupportedSchema(let details),
            .checkpoint(let details):
            details
        case .manifest(let list), .checksumMismatch(let list), .adapterIncompatible(let list),
            .schemaMismatch(let list):
            list.details
        }
    }

    /// The message: one line, or a line for each problem where there are several.
    public var description: String {
        switch self {
        case .manifest(let list), .checksumMismatch(let list), .adapterIncompatible(let list),
            .schemaMismatch(let list):
            list.description
        default: details.description
        }
    }

    /// The same text, as `localizedDescription` gives it out.
    public var errorDescription: String? { description }
}
