/// `completions`: a script that lets a shell complete verbs and options.
enum Completions {
    static let verb = Verb(
        name: "completions", summary: "Print a script that completes verbs and options in a shell.",
        places: [Verb.Place(name: "SHELL", help: "bash or zsh.")], options: [],
        examples: [
            "medphi-kit completions bash > ~/.local/share/bash-completion/completions/medphi-kit",
            "medphi-kit completions zsh > ~/.zfunc/_medphi-kit",
        ],
        run: run)

    private static func run(_ arguments: Arguments, _ console: Console) async throws -> Int32 {
        switch arguments.place("SHELL") {
        case "bash": console.print(bash)
        case "zsh": console.print(zsh)
        default:
            let shell = Console.shown(arguments.place("SHELL") ?? "")
            throw UsageFailure("SHELL is '\(shell)', expected bash or zsh")
        }
        return 0
    }

    private static var names: String {
        MedPhiKitCommand.verbs.map(\.name).joined(separator: " ")
    }

    /// For each verb: what a `case` line of both shells looks for, and its options.
    private static func cases(_ line: (String, String) -> String) -> String {
        MedPhiKitCommand.verbs.map { verb in
            let words =
                verb.options.map { "--\($0.name)" } + ["--help"]
                + (verb.name == "completions" ? ["bash", "zsh"] : [])
            return line(verb.name, words.joined(separator: " "))
        }.joined(separator: "\n")
    }

    private static var bash: String {
        """
        _medphi_kit() {
          local word="${COMP_WORDS[COMP_CWORD]}" words="\(names) --help --version"
          if [ "$COMP_CWORD" -gt 1 ]; then
            case "${COMP_WORDS[1]}" in
        \(cases { "      \($0)) words=\"\($1)\" ;;" })
              *) words="" ;;
            esac
          fi
          COMPREPLY=($(compgen -W "$words" -- "$word"))
        }
        complete -o default -F _medphi_kit medphi-kit
        """
    }

    private static var zsh: String {
        """
        #compdef medphi-kit
        if (( CURRENT == 2 )); then
          compadd -- \(names) --help --version
        else
          case "$words[2]" in
        \(cases { "    \($0)) compadd -- \($1) ;;" })
          esac
          _files
        fi
        """
    }
}
