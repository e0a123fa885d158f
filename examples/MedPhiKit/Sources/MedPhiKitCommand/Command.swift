import Foundation
import MedPhiKit

/// The command line tool `medphi-kit`, as a library so that tests run it.
public enum MedPhiKitCommand {
    /// The version of the tool and of the package.
    public static let version = "0.1.0"

    /// Runs the command.
    ///
    /// - Parameters:
    ///   - arguments: what was typed, without the tool's own name.
    ///   - input: gives the bytes of standard input, asked for only where a `-` is read.
    ///   - output: takes what is asked for: text, ids, JSON.
    ///   - errors: takes progress, timings and the one line that says what went wrong.
    /// - Returns: the exit code: 0, 1 for a failure, 2 for wrong usage, 130 when cancelled, 141
    ///   when nobody reads the output any more.
    public static func run(
        arguments: [String], input: @escaping @Sendable () throws -> Data = Console.standardInput,
        output: @escaping @Sendable (String) throws -> Void = Console.standardOutput,
        errors: @escaping @Sendable (String) -> Void = Console.standardError
    ) async -> Int32 {
        let console = Console(input: input, output: output, errors: errors)
        do {
            let code = try await start(arguments, console)
            if code == 0 { try console.requireWritten() }
            return code
        } catch let failure as OutputFailure {
            if failure.isClosedPipe { return 141 }
            console.fail(
                "standard output cannot be written (\(failure.reason)); what is there is not whole. "
                    + "Make room or write to another place, and run it again.")
            return 1
        } catch let usage as UsageFailure {
            let verb = usage.verb.map { " \($0)" } ?? ""
            console.fail("\(usage.message); see medphi-kit\(verb) --help")
            return 2
        } catch is CancellationError {
            console.fail("stopped")
            return 130
        } catch let error as Phi3Error {
            console.fail(error.details.description)
            return 1
        } catch {
            let lines = error.localizedDescription.split(whereSeparator: \.isNewline)
            console.fail(lines.joined(separator: " "))
            return 1
        }
    }

    private static func start(_ arguments: [String], _ console: Console) async throws -> Int32 {
        guard let first = arguments.first else {
            throw UsageFailure("no verb; expected one of \(names)", verb: nil)
        }
        switch first {
        case "--help", "-h", "help":
            if first == "help", arguments.count > 1 {
                console.print(try verb(arguments[1]).help)
            } else {
                console.print(help)
            }
            return 0
        case "--version":
            console.print("medphi-kit \(version)")
            return 0
        default: break
        }
        let verb = try verb(first)
        let rest = Array(arguments.dropFirst())
        if Arguments.asksForHelp(rest) {
            console.print(verb.help)
            return 0
        }
        do {
            return try await verb.run(try Arguments(rest, verb), console)
        } catch let usage as UsageFailure {
            throw UsageFailure(usage.message, verb: verb.name)
        } catch Phi3Error.option(let details) {
            let name = typed(details.place, verb)
            throw UsageFailure(
                "\(name) is \(details.found), expected \(details.expected)", verb: verb.name)
        }
    }

    /// An option of the library as it is typed: `maxTokens` is `--max-tokens`.
    private static func typed(_ name: String, _ verb: Verb) -> String {
        let words = name.reduce(into: "") { words, letter in
            words += letter.isUppercase ? "-\(letter.lowercased())" : String(letter)
        }
        return verb.options.contains { $0.name == words } ? "--\(words)" : name
    }

    /// Every verb, in the order of the help.
    static let verbs = [
        Inspect.verb, Verify.verb, Tokenize.verb, Generate.verb, Bench.verb, Install.verb,
        Completions.verb,
    ]

    private static var names: String { verbs.map(\.name).joined(separator: ", ") }

    private static func verb(_ name: String) throws -> Verb {
        if let verb = verbs.first(where: { $0.name == name }) { return verb }
        let what = name.hasPrefix("-") ? "option" : "verb"
        let near = Nearest.of(name, among: verbs.map(\.name) + ["--help", "--version"])
        throw UsageFailure(
            "no \(what) '\(Console.shown(name))'; "
                + (near.map { "did you mean \($0)?" } ?? "expected one of \(names)"), verb: nil)
    }

    private static var help: String {
        let width = verbs.map(\.name.count).max() ?? 0
        let lines = verbs.map { verb in
            "  \(verb.name.padding(toLength: width, withPad: " ", startingAt: 0))  \(verb.summary)"
        }
        return """
            medphi-kit VERB …: look at, check and run models that write clinical notes.

            \(lines.joined(separator: "\n"))

            medphi-kit VERB --help says more about one. --version prints the version.
            MODEL is a bundle NAME.medphi, the folder of a checkpoint, or a single .safetensors.

            Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C, 141 nobody reads the
            output any more (as behind "| head -1").

            Not a medical device: a clinician must read and correct every note.
            """
    }
}

/// A command that was typed wrongly.
struct UsageFailure: Error {
    var message: String
    var verb: String?

    init(_ message: String, verb: String? = nil) {
        self.message = message
        self.verb = verb
    }
}
