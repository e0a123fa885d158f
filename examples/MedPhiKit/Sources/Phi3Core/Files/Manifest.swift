/// `metadata.json` of a bundle, key for key.
///
/// The first keys are those of Apple's bundles (schema 0.2); all of this project's lie under
/// `medphi`. Every key must be there; keys beside them are left alone.
public struct Manifest: Sendable, Equatable {
    /// The form of Apple's part: "0.2".
    public var metadataVersion: String
    /// What the bundle holds: "llm".
    public var kind: String
    /// What people call the model.
    public var name: String
    /// The package's path in the bundle.
    public var mainAsset: String
    /// What Apple's schema says of a language model.
    public var language: Language
    /// Where the weights come from.
    public var source: Source
    /// How the weights are stored, for people.
    public var compression: String
    /// What it was compiled for, and when it was written.
    public var compilation: Compilation
    /// Everything that Apple's schema has no key for.
    public var medphi: MedPhi

    /// The file's name in a bundle.
    public static let fileName = "metadata.json"
    /// The newest form of the `medphi` part that this package reads.
    public static let schema = 1

    /// What Apple's schema says of a language model.
    public struct Language: Sendable, Equatable {
        /// The tokenizer's folder in the bundle.
        public var tokenizer: String
        /// Rows of the embedding.
        public var vocabSize: Int
        /// Tokens of the longest context.
        public var maxContextLength: Int
        /// Whether the tokenizer is in the bundle.
        public var embeddedTokenizer: Bool
        /// "prefill" and "decode" -> the package's functions for them.
        public var functionMap: [String: [String]]
    }

    /// Where the weights come from.
    public struct Source: Sendable, Equatable {
        /// Hub id or folder name.
        public var modelID: String
        /// Commit of the hub; `nil`: not known.
        public var revision: String?
        /// The terms of use, in words.
        public var licence: String
    }

    /// What the package was compiled for, and when it was written.
    public struct Compilation: Sendable, Equatable {
        /// Systems it is compiled for already.
        public var targets: [String]
        /// The date, in ISO form.
        public var date: String
    }

    /// Everything that Apple's schema has no key for.
    public struct MedPhi: Sendable, Equatable {
        /// The form of this part; see `Manifest.schema`.
        public var schema: Int
        /// How the package is called.
        public var coreml: CoreMLFacts
        /// The architecture.
        public var model: ModelFacts
        /// How the weights are stored.
        public var quantization: QuantizationFacts
        /// The tokenizer's files and hashes.
        public var tokenizer: TokenizerFacts
        /// Ids that end a text, and settings to begin with.
        public var generation: GenerationFacts
        /// How adapters reach the model, and which there are.
        public var adapters: Adapters
        /// Which base the weights are.
        public var baseFingerprint: Fingerprint
        /// Bytes that the model needs.
        public var memory: MemoryFacts
        /// Predicted figures, as the exporter computed them.
        public var cost: JSONObject
        /// How far the bundle was verified.
        public var verification: Verification
        /// The settings of the export.
        public var export: JSONObject
        /// Versions of what made the bundle; `nil`: not known.
        public var exporter: [String: String?]
        /// Every file but the manifest and the list of hashes.
        public var files: [FileEntry]
    }

    /// The tokenizer's files; hashes are of their bytes.
    public struct TokenizerFacts: Sendable, Equatable {
        /// What the ids are made by: "tokenizer.json".
        public var pipeline: String
        /// `tokenizer.json` in the bundle.
        public var path: String
        /// Its SHA-256.
        public var sha256: String
        /// The chat template in the bundle.
        public var chatTemplate: String
        /// Its SHA-256.
        public var chatTemplateSHA256: String
        /// What surrounds the messages of a chat.
        public var chatFormat: ChatFormat
        /// The test vectors in the bundle.
        public var vectors: String
    }

    /// What surrounds the messages of a chat.
    public struct ChatFormat: Sendable, Equatable {
        /// "phi3".
        public var name: String
        /// Text before the first message.
        public var opening: String
        /// Text after the last one where nothing is to follow.
        public var closing: String
        /// Text after a role's token.
        public var afterRole: String
        /// Text after the token that ends a message.
        public var afterEnd: String
        /// Whether the template has a system role.
        public var knowsSystem: Bool
        /// Whether it leaves out an empty system message.
        public var skipsEmptySystem: Bool
    }

    /// Ids that end a text, ids by their part in a chat, and settings to begin with.
    public struct GenerationFacts: Sendable, Equatable {
        /// Ids that end a text.
        public var stopTokenIDs: [Int]
        /// "bos", "end", "user" and so on -> id.
        public var specialTokenIDs: [String: Int]
        /// Ids that no token has, both ends included.
        public var suppressRanges: [ClosedRange<Int>]
        /// Settings to begin with.
        public var defaults: JSONObject
    }

    /// How adapters reach the model.
    public struct Adapters: Sendable, Equatable {
        /// The ways there are.
        public enum Mode: String, Sendable, CaseIterable {
            /// Folded into the weights.
            case fused
            /// Written into slots at run time.
            case slots
            /// Built in, a pair of functions for each.
            case functions
            /// None.
            case none
        }

        /// What slots are to Core ML.
        public enum SlotKind: String, Sendable, CaseIterable {
            /// States, written once.
            case state
            /// Inputs, bound at every call.
            case input
        }

        /// One adapter of the bundle.
        public struct Entry: Sendable, Equatable {
            /// What an app asks for.
            public var name: String
            /// Its pack; `nil` where it exists in the package only.
            public var path: String?
            /// The pack's SHA-256.
            public var sha256: String?
            /// Its own rank, before padding to the slots'.
            public var rank: Int
            /// "prefill" and "decode" -> the functions it is built into.
            public var functions: [String: String]
            /// What it says of its training.
            public var training: JSONObject
        }

        /// How adapters reach the model.
        public var mode: Mode
        /// What slots are; `nil` without.
        public var slotKind: SlotKind?
        /// The slots' rank; `nil` without.
        public var rankSlot: Int?
        /// Projections that have slots, e.g. "gate_up".
        public var modules: [String]
        /// The adapters of the bundle.
        public var list: [Entry]
    }

    /// How far the bundle was verified, and each level's figures.
    public struct Verification: Sendable, Equatable {
        /// The levels, in order.
        public enum Level: String, Sendable, CaseIterable, Comparable {
            /// Not at all.
            case none
            /// The package is what the manifest says.
            case spec
            /// Its graph computes what the model does.
            case graph
            /// Core ML computes it too, on a device.
            case predict

            /// Whether one is reached before the other.
            public static func < (left: Level, right: Level) -> Bool {
                allCases.firstIndex(of: left) ?? 0 < allCases.firstIndex(of: right) ?? 0
            }
        }

        /// The highest level reached.
        public var level: Level
        /// The figures of each level that was reached.
        public var figures: [Level: JSONObject]
    }

    /// One file of the bundle.
    public struct FileEntry: Sendable, Equatable {
        /// Its path in the bundle.
        public var path: String
        /// Its size.
        public var bytes: Int
        /// Its SHA-256.
        public var sha256: String
    }
}
