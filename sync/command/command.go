// Package command runs what a manifest asks for: sh -c in a process group of its own, with a timeout, a user, a bounded
// wait for pipes that a daemon inherited, and bounded output.
package command

import (
	"context"
	"log/slog"

	"kedge/deployments"
)

// Env is given to every command, as KEDGE_… variables beside the agent's own environment.
type Env struct {
	Unit     deployments.UnitID
	Node     string
	Release  string // directory of the new release
	Previous string // directory of the one before; empty at the first
	Dest     string
	Digest   deployments.Digest
	Version  string
	Commit   string
	Name     string
}

// Result is what a command did.
type Result struct {
	// Output is the end of what it wrote to both streams, at most MaxOutput bytes, with a line that says how much was left out.
	Output []byte
	// Exit is its exit status; -1 where it was ended by a signal or never ran.
	Exit int
}

// MaxOutput bounds what is kept of one command's output, in bytes.
const MaxOutput = 64 << 10

// Run runs c with stdin (may be nil). When ctx ends or c.Timeout is over its process group gets SIGTERM, and 5 s later SIGKILL.
func Run(ctx context.Context, log *slog.Logger, c deployments.Command, env Env, stdin []byte) (Result, error) {
	return run(ctx, log, c, env, stdin)
}
