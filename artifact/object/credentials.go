package object

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
)

// credentialsPatience is how long retrieving AWS credentials may take before that is logged.
// Retrieving those of an instance's role takes some milliseconds.
const credentialsPatience = time.Second

// slowCredentials is a provider of AWS credentials that logs if retrieving them takes longer than credentialsPatience,
// once until they come. On a machine without credentials, AWS's own code asks a metadata service that isn't there, for
// some 20 s before it fails.
type slowCredentials struct {
	aws.CredentialsProvider
	log         *slog.Logger
	delayLogged atomic.Bool // the delay was logged since credentials last came
}

func (c *slowCredentials) Retrieve(ctx context.Context) (aws.Credentials, error) {
	timer := time.AfterFunc(credentialsPatience, func() {
		if c.delayLogged.CompareAndSwap(false, true) {
			c.log.Info("waiting for AWS credentials: if there are none in the environment, in files or in a role of the " +
				"machine, it takes some 20 s until that is known")
		}
	})
	defer timer.Stop()
	found, err := c.CredentialsProvider.Retrieve(ctx)
	if err == nil {
		c.delayLogged.Store(false)
	}
	return found, err
}
