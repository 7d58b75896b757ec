package agent

import (
	"time"

	"kedge/deployments/wait"
)

// maxRetry is the longest pause between tries.
const maxRetry = 30 * time.Second

// newBackoff returns the pauses between tries of whatever failed on this node or at the store.
func newBackoff() *wait.Backoff { return wait.NewBackoff(250*time.Millisecond, maxRetry/2) }
