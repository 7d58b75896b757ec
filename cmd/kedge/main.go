// Command kedge is pull-based deployment for fleets of Linux nodes: one binary for the mirror, the agent, and what
// people type.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	_ "time/tzdata" // freeze windows name time zones, and a minimal host has no database of them

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/kv"
	"kedge/kv/open"
	"kedge/sync/fleet"
)

// Exit codes, the same for every command.
const (
	exitDone         = 0
	exitFailed       = 1
	exitUsage        = 2
	exitNotConverged = 3
)

// errNotConverged leads to exit code 3: waiting for nodes or for a mirror timed out.
var errNotConverged = errors.New("not converged in time")

// usageError is an error that leads to exit code 2, and to a line that names the command's manual.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// hintError is an error after which lines are printed that say what to do next.
type hintError struct {
	error
	hint string
}

func (e hintError) Unwrap() error { return e.error }

func main() { os.Exit(run(translateArgs(os.Args[0], os.Args[1:]), os.Stdin, os.Stdout, os.Stderr)) }

// run executes a command line and returns its exit code; SIGINT and SIGTERM end it. Tests of the command line call it.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr}
	root := newRoot(a)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	a.printMessage("kedge: %s", safetext.URLs(err.Error()))
	var hint hintError
	if errors.As(err, &hint) {
		a.printMessage("  %s", strings.ReplaceAll(hint.hint, "\n", "\n  "))
	} else if hint := a.storeHint(err); hint != "" {
		a.printMessage("  %s", hint)
	}
	switch {
	case errors.As(err, new(usageError)):
		a.printMessage("  see %s --help", cmd.CommandPath())
		return exitUsage
	case errors.Is(err, errNotConverged):
		return exitNotConverged
	}
	return exitFailed
}

// storeHint returns what to check about an error of the store. It is empty if err is another error, or speaks for
// itself. For a store other than Consul it has hints only on parts that could not be read.
func (a *app) storeHint(err error) string {
	switch {
	case errors.Is(err, fleet.ErrTooMuch) || errors.Is(err, fleet.ErrLate):
		return a.unreadHint(err)
	case !a.onConsul():
		return ""
	case errors.Is(err, kv.ErrTooLarge):
		return "" // the error says what to do
	case errors.Is(err, kv.ErrUnavailable):
		return fmt.Sprintf(
			"is Consul up at %s (CONSUL_HTTP_ADDR), and has it a leader? nodes go on with what they have",
			safetext.URLs(envOr("CONSUL_HTTP_ADDR", "localhost:8500")),
		)
	case errors.Is(err, kv.ErrEmpty):
		return fmt.Sprintf("has a mirror run yet (kedge mirror REPO), and is %s its --prefix?",
			cmp.Or(a.prefix, kv.DefaultPrefix))
	case errors.Is(err, kv.ErrNoFolder):
		return fmt.Sprintf(
			"has a mirror run yet (kedge mirror REPO), and is %s its --prefix? Else CONSUL_HTTP_TOKEN has to be a token "+
				"that may do this: for operators, one with the rules of kedge acl operator",
			cmp.Or(a.prefix, kv.DefaultPrefix),
		)
	case errors.Is(err, kv.ErrDenied):
		return "CONSUL_HTTP_TOKEN has to be a token that may do this: " +
			"for operators, one with the rules of kedge acl operator"
	}
	return ""
}

// unreadHint returns what to do about a part of the store that could not be read.
func (a *app) unreadHint(err error) string {
	var hints []string
	if errors.Is(err, fleet.ErrTooMuch) {
		hints = append(hints, "remove the keys that don't belong there; until then, look at one role at a time: "+
			"kedge status STAGE/ROLE")
	}
	if errors.Is(err, fleet.ErrLate) {
		hints = append(hints, "try again, as Consul may have been busy. If it stays so, count the keys below the prefix "+
			"that the error names: consul kv get -keys -separator= "+cmp.Or(a.prefix, kv.DefaultPrefix)+"PREFIX | wc -l, "+
			"and remove those that don't belong there")
	}
	return strings.Join(hints, "\n")
}

// printMessage prints a message for a person on stderr, wrapped at the width of the terminal if stderr is one.
func (a *app) printMessage(format string, args ...any) {
	text := fleet.CleanLines(fmt.Sprintf(format, args...))
	fmt.Fprintln(a.stderr, fleet.Wrap(text, terminalWidth(a.stderr)))
}

// app is the state that all commands share: the streams, the global flags, and --json.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer

	kv, prefix          string
	logFormat, logLevel string
	json                bool
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "kedge",
		Short: "Pull-based deployment: Git push, Consul KV, S3, and every node hauls itself there",
		Long: `kedge deploys by state, not by events. A deployments repo in Git says which release every unit should run;
the mirror copies that to Consul KV; the agent on every node watches it, fetches what changed from S3, verifies it,
switches atomically, and reports. A node that boots reads the same key and ends in the same place.

  kedge demo            see the whole of it on this machine

A unit is STAGE/ROLE/UNIT, as in prod/web/app. A pointer is URL@sha256:HEX, as kedge publish prints it.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not done in time.`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				return usagef("unknown command %q: did you mean %s?", args[0], strings.Join(near, " or "))
			}
			return usagef("unknown command %q", args[0])
		},
		PersistentPreRun: func(cmd *cobra.Command, _ []string) {
			if cmd.GroupID != "daemon" && !strings.HasPrefix(cmd.Name(), "__") { // daemons refuse them, completion is silent
				a.warnOfVariables(os.Environ())
			}
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	const most = 100 // columns, so that text is easy to read
	width := cmp.Or(min(a.terminal(), most), 80)
	root.SuggestionsMinimumDistance = 2
	root.SetHelpCommand(&cobra.Command{
		Use:    "help [COMMAND|TOPIC]",
		Short:  "The manual of a command, or a page of the manual",
		Hidden: true,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 1 {
				if page, ok := deployments.Page(args[0]); ok {
					_, err := io.WriteString(a.stdout, pageText(page, width))
					return err
				}
			}
			c, _, err := root.Find(args)
			if err == nil && c == root && len(args) > 0 {
				err = noPage(root, args[0])
			}
			if err != nil {
				return err
			}
			c.InitDefaultHelpFlag()
			return c.Help()
		},
	})
	// No template is set for version, usage (see usage) or help. text/template calls methods by name.
	// With a template, the linker would keep every exported method of every type, including most of
	// S3's client. That is 9 MB of the binary, and 3 MB of an idle agent's memory.
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	f := root.PersistentFlags()
	f.StringVar(
		&a.kv,
		"kv",
		os.Getenv("KEDGE_KV"),
		"`URL` of the store: consul (by CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, …), or file://DIR; also KEDGE_KV (default consul)",
	)
	f.Lookup("kv").DefValue = "" // the value of KEDGE_KV is not shown as the default
	f.StringVar(&a.prefix, "prefix", envOr("KEDGE_PREFIX", kv.DefaultPrefix),
		"prefix of every key in Consul; also KEDGE_PREFIX")
	f.StringVar(&a.logFormat, "log-format", envOr("KEDGE_LOG_FORMAT", "text"), "text or json; also KEDGE_LOG_FORMAT")
	f.StringVar(&a.logLevel, "log-level", envOr("KEDGE_LOG_LEVEL", "info"),
		"debug, info, warn or error; also KEDGE_LOG_LEVEL")

	root.AddGroup(&cobra.Group{ID: "start", Title: "Start here"}, &cobra.Group{ID: "daemon", Title: "Daemons"},
		&cobra.Group{ID: "release", Title: "Releases and the deployments repo"},
		&cobra.Group{ID: "fleet", Title: "Look at the fleet"}, &cobra.Group{ID: "operate", Title: "Operate it"})
	for group, commands := range map[string][]*cobra.Command{
		"start":  {a.demoCommand(), a.versionCommand()},
		"daemon": {a.agentCommand(), a.mirrorCommand()},
		"release": {a.publishCommand(), a.runCommand(), a.verifyCommand(), a.checkCommand(), a.diffCommand(),
			a.schemaCommand(), a.importCommand(), a.bridgeCommand()},
		"fleet":   {a.statusCommand(), a.nodeCommand(), a.explainCommand(), a.historyCommand(), a.waitCommand(), a.webCommand()},
		"operate": append(a.operateCommands(), a.aclCommand()),
	} {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	root.SetCompletionCommandGroupID("start")
	completeFlagValues(root, "log-format", "text", "json")
	completeFlagValues(root, "log-level", "debug", "info", "warn", "error")
	for _, c := range root.Commands() {
		if check := c.Args; check != nil {
			c.Args = func(cmd *cobra.Command, args []string) error {
				if check(cmd, args) != nil {
					return usagef("%s given: want kedge %s", count(len(args), "argument"), cmd.Use)
				}
				return nil
			}
		}
	}
	root.SetUsageFunc(func(cmd *cobra.Command) error {
		describeCompletion(root)
		return usage(cmd.OutOrStderr(), cmd, width)
	})
	root.SetHelpFunc(func(cmd *cobra.Command, _ []string) {
		describeCompletion(root)
		fmt.Fprintf(a.stdout, "%s\n\n%s", reflow(cmp.Or(cmd.Long, cmd.Short), width), cmd.UsageString())
	})
	return root
}

// describeCompletion sets the help of the completion command, which cobra adds at run time.
func describeCompletion(root *cobra.Command) {
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			c.Short = "Completion of commands, units, nodes and releases, for your shell"
			c.Long = "Prints the script that completes commands, flags, and the fleet's units, nodes and releases. " +
				"The packages install it.\n\n  source <(kedge completion bash)"
		}
	}
}

func (a *app) onConsul() bool { return a.kv == "" || a.kv == "consul" }

// open opens the store that the flags name.
func (a *app) open(log *slog.Logger) (kv.Store, error) {
	return a.openStore(open.Config{Log: log})
}

func (a *app) openStore(c open.Config) (kv.Store, error) {
	c.URL, c.Prefix = a.kv, a.prefix
	store, err := open.Store(c)
	if errors.As(err, new(kv.ConfigError)) {
		return nil, usageError{err}
	}
	return store, err
}

// openExisting opens the store for a command that a person waits for, without a log, as errors are
// enough. A missing directory is an error: its name was mistyped, and a new one would look like a
// fleet without units.
func (a *app) openExisting() (kv.Store, error) {
	return a.openStore(open.Config{Existing: true})
}

func (a *app) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(a.logLevel)); err != nil {
		return nil, usagef("--log-level %q: want debug, info, warn or error", a.logLevel)
	}
	opt := &slog.HandlerOptions{Level: level}
	w := forJournal(a.stderr, opt)
	switch a.logFormat {
	case "json":
		return slog.New(safetext.NewHandler(slog.NewJSONHandler(w, opt))), nil
	case "text":
		return slog.New(safetext.NewHandler(slog.NewTextHandler(w, opt))), nil
	}
	return nil, usagef("--log-format %q: want text or json", a.logFormat)
}

// logWhenDone logs message when ctx ends, by which a daemon is asked to finish and stop. It logs
// nothing if the caller has called cancel before.
func logWhenDone(ctx context.Context, log *slog.Logger, message string) (cancel func() bool) {
	return context.AfterFunc(ctx, func() { log.Info(message, "reason", context.Cause(ctx).Error()) })
}

// terminal returns the width of stdout's terminal, or 0 if stdout is no terminal.
func (a *app) terminal() (width int) { return terminalWidth(a.stdout) }

func terminalWidth(w io.Writer) (width int) {
	width, _ = terminalSize(w)
	return width
}

// terminalSize returns a terminal's size in characters, 80x24 if it doesn't tell, or 0, 0 if w is no terminal.
func terminalSize(w io.Writer) (width, height int) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0, 0
	}
	if width, height, err := term.GetSize(int(f.Fd())); err == nil && width > 0 && height > 0 {
		return width, height
	}
	return 80, 24
}

// color reports whether stdout is a terminal that wants colours (https://no-color.org).
func (a *app) color() bool {
	return a.terminal() > 0 && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// VersionInfo is the JSON of kedge version.
type VersionInfo struct {
	Version string `json:"version"`
	// FormatLevel is the newest level of records that this version can act on: see min_agent.
	FormatLevel int    `json:"format_level"`
	Go          string `json:"go"`
	OS          string `json:"os"`
	Arch        string `json:"arch"`
}

func (a *app) versionCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "version",
		Short: "The version of this kedge",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if a.json {
				return a.printJSON(VersionInfo{
					Version: version(), FormatLevel: deployments.FormatLevel,
					Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH,
				})
			}
			fmt.Fprintln(a.stdout, version())
			return nil
		},
	}
	a.jsonFlag(c, "the version")
	return c
}

// packageVersion is the version that .ci/package was told to make, by -ldflags=-X; empty: the build has the commit's
// version.
var packageVersion string

// version returns the build's version: its package's, the tag or commit that the Go tool stamped, devel or unknown.
func version() string {
	if packageVersion != "" {
		return packageVersion
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	var revision, dirty string
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			revision = s.Value
		case "vcs.modified":
			if s.Value == "true" {
				dirty = "+changes"
			}
		}
	}
	if revision == "" {
		return "devel"
	}
	return strings.TrimSpace(revision[:min(12, len(revision))] + dirty)
}
