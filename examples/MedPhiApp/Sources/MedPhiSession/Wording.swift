import Foundation
import MedPhiKit

/// Every sentence of the app that is about what it is, and numbers in words.
public enum Wording {
    /// Stands on the screen at all times.
    public static let notADevice =
        "Not a medical device. A note written by a model can be wrong in ways that read well. "
        + "Read it against the conversation and correct it before anyone relies on it."
    /// Stands below a copied note that nobody has marked as read and corrected.
    public static let draft = "[Draft written by a model, not checked by a clinician.]"
    /// Beside the switch that drops that line.
    public static let checked = "I have read this note against the conversation and corrected it."
    /// What a person without a model is to do.
    public static let noModel =
        "Open a bundle that `medphi export` made, or a folder or file with a Phi-3. "
        + "Everything stays on this device: the app opens no connection."

    /// Bytes in decimal units, as disks count them.
    public static func size(_ bytes: Int) -> String {
        var (value, unit) = (Double(bytes), "bytes")
        for larger in ["kB", "MB", "GB"] where value >= 1000 {
            (value, unit) = (value / 1000, larger)
        }
        return unit == "bytes" ? "\(bytes) bytes" : "\(decimals(value, 1)) \(unit)"
    }

    /// A time in seconds.
    public static func seconds(_ value: Double) -> String {
        "\(decimals(value, value < 10 ? 2 : 0)) s"
    }

    /// A number of things: "1 turn", "3 turns".
    public static func count(_ number: Int, _ noun: String) -> String {
        "\(number) \(noun)\(number == 1 ? "" : "s")"
    }

    /// A number with so many digits behind the point, the same in every language of the device.
    static func decimals(_ value: Double, _ digits: Int) -> String {
        String(format: "%.\(digits)f", locale: Locale(identifier: "en_US_POSIX"), value)
    }

    /// What goes on while a model is opened.
    public static func opening(_ event: LoadEvent?) -> String {
        switch event {
        case nil: "Reading the files"
        case .verifying(let done, let total):
            "Checking the files: \(size(done)) of \(size(total))"
        case .compiling: "Preparing the model for this device; the first time takes minutes"
        case .specializing: "Fitting the model to this device; the first time takes minutes"
        case .loading: "Reading the weights"
        case .ready: "Ready"
        }
    }

    /// Why a note ended; `nil` where it is simply finished.
    public static func ending(_ reason: StopReason) -> String? {
        switch reason {
        case .endOfTurn, .stopString: nil
        case .maxTokens: "The note is cut off: it reached the longest length that was allowed."
        case .contextFull: "The note is cut off: conversation and note fill the model's context."
        case .cancelled: "The note is cut off: you stopped it."
        }
    }

    /// What of the conversation the model did not read; `nil`: it read everything.
    public static func leftOut(_ start: NoteStart) -> String? {
        if start.isWhole { return nil }
        var parts: [String] = []
        if start.leftOutTurns > 0 { parts.append(count(start.leftOutTurns, "turn")) }
        if start.leftOutWords > 0 { parts.append(count(start.leftOutWords, "word")) }
        return "The conversation is longer than the model can read: "
            + "\(parts.joined(separator: " and ")) in its middle were left out. "
            + "The note knows nothing of them."
    }
}
