package secret

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/arn"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/secretsmanager"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	"github.com/aws/smithy-go/logging"
)

// awsConfig loads AWS's configuration at the first secret that needs it, as most nodes need none.
type awsConfig struct {
	mu     sync.Mutex
	config *aws.Config
}

// configFor returns the configuration for a name, which may be an ARN in another region. If no
// region is known, that is an error.
func (c *awsConfig) configFor(ctx context.Context, name string) (aws.Config, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.config == nil {
		conf, err := config.LoadDefaultConfig(ctx, config.WithEC2IMDSRegion(), config.WithLogger(logging.Nop{}))
		if err != nil {
			return aws.Config{}, fmt.Errorf("reading AWS's configuration: %w", err)
		}
		c.config = &conf
	}
	conf := c.config.Copy()
	if a, err := arn.Parse(name); err == nil && a.Region != "" {
		conf.Region = a.Region
	}
	if conf.Region == "" {
		c.config = nil // the instance's metadata service may answer next time
		return conf, errors.New("AWS's region is not known: set AWS_REGION")
	}
	return conf, nil
}

// parameter reads a parameter of Systems Manager, decrypted.
func (c *awsConfig) parameter(ctx context.Context, name string) (string, error) {
	conf, err := c.configFor(ctx, name)
	if err != nil {
		return "", err
	}
	out, err := ssm.NewFromConfig(conf).GetParameter(ctx, &ssm.GetParameterInput{
		Name: &name, WithDecryption: aws.Bool(true),
	})
	if err != nil {
		return "", err
	}
	if out.Parameter == nil || out.Parameter.Value == nil {
		return "", errors.New("the answer of AWS has no value")
	}
	return *out.Parameter.Value, nil
}

// secret reads the current version, text or binary, of a secret of Secrets Manager.
func (c *awsConfig) secret(ctx context.Context, name string) (string, error) {
	conf, err := c.configFor(ctx, name)
	if err != nil {
		return "", err
	}
	out, err := secretsmanager.NewFromConfig(conf).
		GetSecretValue(ctx, &secretsmanager.GetSecretValueInput{SecretId: &name})
	if err != nil {
		return "", err
	}
	if out.SecretString == nil {
		return string(out.SecretBinary), nil
	}
	return *out.SecretString, nil
}
