package mirror

import (
	"encoding/json"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/git"
)

func rulesOf(l *git.Commit) deployments.MirrorRules {
	return deployments.MirrorRules{AllowRewind: l.Tree.Settings.AllowRewind, MaxRemoved: l.Tree.Settings.MaxRemoved}
}

// maxError bounds MirrorState.Error, in bytes: a commit may have any number of mistakes.
const maxError = 4 << 10

// maxLogged bounds what a line of the log says of keys that others may write, in bytes.
const maxLogged = 1 << 10

// worthWriting reports whether next tells more than was: not where only numbers in the error differ (ports, counts,
// times), for minutes on end. at is when was was written. Pure.
func worthWriting(was, next deployments.MirrorState, at, now time.Time) bool {
	if withoutDigits(was.Error) == withoutDigits(next.Error) && now.Sub(at) < sameTrouble {
		was.Error = next.Error
	}
	return !was.Equal(next)
}

const sameTrouble = 5 * time.Minute

func withoutDigits(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, s)
}

// writeStatus puts s at mirror/state.
func writeStatus(s deployments.MirrorState) change {
	return change{status: &s, ops: []kv.Op{kv.Put(kv.MirrorKey, encodeStatus(s))}}
}

func encodeStatus(s deployments.MirrorState) []byte {
	value, err := json.Marshal(s)
	if err != nil {
		panic(err) // plain data
	}
	return value
}

// clip cuts an error's text at a line's end.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	s = s[:n]
	for i := len(s) - 1; i > n/2; i-- {
		if s[i] == '\n' {
			return s[:i] + "\n..."
		}
	}
	return s + "..."
}
